"""What a step needs: inputs, optimizer, averages, guard, meters, log."""

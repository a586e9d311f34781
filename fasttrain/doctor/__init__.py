"""What a machine has and lacks, and which decoders work on its GPU."""

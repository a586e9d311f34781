"""Memory traffic of a training step by kind of operation: python scripts/traffic.py [--arch A ...] [--json FILE]

Counts the bytes that each operation of a network's forward and backward pass reads and writes, in bfloat16 and
channels_last, if each is a separate kernel (eager). Also counts the multiply-adds of convolutions and linear layers.
The counts are exact and need no device. They ignore caches and a compiler's fusions: the shares show where fusion pays
off.
"""

import json
import platform
import sys
from collections import Counter
from collections.abc import Iterable
from datetime import date
from pathlib import Path
from typing import Any

import click
import timm
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout need not be installed
from fasttrain.benchmarks.common import check_overwritable
from fasttrain.models import ARCHS, Classifier
from fasttrain.utils.errors import UserError
from fasttrain.utils.files import replacing

KINDS = ("convolution", "depthwise", "norm", "activation", "add and scale", "pooling", "rest")
_KIND_OF = {
    **dict.fromkeys(("native_batch_norm", "native_batch_norm_backward"), "norm"),
    **dict.fromkeys(("cudnn_batch_norm", "_native_batch_norm_legit", "batch_norm_backward"), "norm"),
    **dict.fromkeys(("relu", "relu_", "leaky_relu", "leaky_relu_", "sigmoid", "sigmoid_", "silu"), "activation"),
    **dict.fromkeys(("threshold_backward", "leaky_relu_backward", "sigmoid_backward", "silu_backward"), "activation"),
    **dict.fromkeys(("_softmax", "_softmax_backward_data", "hardtanh", "hardtanh_backward"), "activation"),
    **dict.fromkeys(("add", "add_", "mul", "mul_", "div", "div_", "sum", "sub"), "add and scale"),
    **dict.fromkeys(("mean", "max_pool2d_with_indices", "max_pool2d_with_indices_backward"), "pooling"),
    **dict.fromkeys(("avg_pool2d", "avg_pool2d_backward", "_adaptive_avg_pool2d"), "pooling"),
    **dict.fromkeys(("mm", "addmm", "bmm"), "convolution"),
}
# Only these create a tensor without moving its values.
_FREE = {"view", "_unsafe_view", "reshape", "t", "expand", "permute", "transpose", "detach", "alias", "as_strided"}
_FREE |= {"unsqueeze", "squeeze", "slice", "select", "split", "split_with_sizes", "empty", "empty_like", "new_empty"}


class Traffic(TorchDispatchMode):
    """Counts the bytes that operations read and write, by kind, while the mode is active."""

    def __init__(self) -> None:
        super().__init__()
        self.moved: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name not in _FREE:
            read, written = (set(_tensors(values)) for values in ((args, kwargs), result))
            # A tensor that is changed in place counts as read and as written.
            count = sum(tensor.nbytes for tensor in read) + sum(tensor.nbytes for tensor in written)
            self.moved[self._kind(name, args)] += count
        return result

    @staticmethod
    def _kind(name: str, args: Any) -> str:
        if name in ("convolution", "convolution_backward"):
            tensors = [value for value in args if isinstance(value, Tensor)]
            weight = tensors[1] if name == "convolution" else tensors[2]
            return "depthwise" if weight.shape[1] == 1 and weight.shape[0] > 1 else "convolution"
        return _KIND_OF.get(name, "rest")


def _tensors(values: Any) -> Iterable[Tensor]:
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


def count(model: nn.Module, batch: int, size: int) -> tuple[Traffic, int]:
    """Traffic and multiply-adds of one forward and backward pass of a network on the meta device."""
    images = torch.empty(batch, 3, size, size, dtype=torch.bfloat16, device="meta")
    images = images.contiguous(memory_format=torch.channels_last)
    model = model.to(torch.bfloat16).to(memory_format=torch.channels_last).train()
    with Traffic() as traffic, FlopCounterMode(display=False) as flops:
        output = model(images)
        getattr(output, "logits", output).sum().backward()
    return traffic, flops.get_total_flops() // 2


@click.command()
@click.option("--arch", "archs", multiple=True, default=tuple(ARCHS), help="Repeatable. Default: the report's three.")
@click.option("--batch-size", type=click.IntRange(1), default=64, show_default=True)
@click.option("--image-size", type=click.IntRange(32), default=224, show_default=True)
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures.")
def main(archs: tuple[str, ...], batch_size: int, image_size: int, json_path: Path | None) -> None:
    try:
        if json_path:
            check_overwritable(json_path)
    except UserError as error:
        raise click.ClickException(str(error)) from None
    rows = []
    for arch in archs:
        with torch.device("meta"):
            traffic, multiply_adds = count(Classifier(arch, 1000), batch_size, image_size)
        total = traffic.moved.total()
        shares = {kind: traffic.moved[kind] / total for kind in KINDS}
        rows.append(
            {
                "arch": arch,
                "mib_an_image": total / batch_size / 2**20,
                "gmac_an_image": multiply_adds / batch_size / 1e9,
                "shares": shares,
            }
        )
        summary = ", ".join(f"{kind} {share:.0%}" for kind, share in shares.items() if share >= 0.005)
        mib, gmac = rows[-1]["mib_an_image"], rows[-1]["gmac_an_image"]
        click.echo(f"{arch}: {mib:.0f} MiB per image, {gmac:.1f} GMAC: {summary}")
    if json_path:
        versions = {"torch": torch.__version__.split("+")[0], "timm": timm.__version__}
        content = {
            "device": "counted, on no device",
            "date": date.today().isoformat(),
            "versions": {"python": platform.python_version(), **versions},
            "settings": {"batch_size": batch_size, "image_size": image_size, "precision": "bf16"},
            "rows": rows,
        }
        with replacing(json_path) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

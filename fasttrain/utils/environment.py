"""What a machine has, and what it may lack, said in one line: variables of torchrun, a home folder, a compiler."""

import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from fasttrain.utils.errors import UserError
from fasttrain.utils.text import printable


def torchrun_variable(name: str, default: int) -> int:
    """The number in a variable that torchrun sets, such as RANK. Raises UserError where it is not one."""
    text = os.environ.get(name, "")
    if not text:
        return default
    if not (text.isascii() and text.isdigit()):
        raise UserError(f"the variable {name} is {printable(text)!r}, not a number; start several ranks with torchrun")
    return int(text)


def cpu_name() -> str:
    """The CPU's model, or its architecture where the system does not tell the model."""
    return next(iter(cpuinfo("model name")), f"{platform.machine()} CPU")


def cpuinfo(key: str) -> list[str]:
    """The values of a key in Linux's /proc/cpuinfo, one per core that has it; empty on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return []
    return [line.partition(":")[2].strip() for line in lines if line.startswith(key)]


def require_current_folder() -> None:
    """Raises UserError where the current folder has been deleted."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UserError("the current folder no longer exists; change to another one") from None


def require_working_python() -> None:
    """Raises UserError where Python, or tqdm, is told by a variable to run in a way that cannot work."""
    if sys.flags.optimize > 1:
        raise UserError(
            "Python leaves out docstrings, which DALI needs; start it without -OO and with PYTHONOPTIMIZE below 2"
        )
    names = [name for name in os.environ if name.startswith("TQDM_")]
    if names:
        try:
            import tqdm  # noqa: F401
        except ValueError as error:
            raise UserError(f"tqdm does not accept {' or '.join(names)}: {printable(str(error))}") from None


def exhausted(error: BaseException) -> str:
    """What the machine has too little of, main memory or threads, as one line; empty for any other error."""
    for each in _chain(error):
        text = str(each)
        if isinstance(each, MemoryError) or re.search(
            r"DefaultCPUAllocator|std::bad_alloc|Cannot allocate memory", text
        ):
            return "the machine's memory is full; stop other programs, or use a smaller batch or fewer --workers"
        if re.search(r"can't start new thread|Resource temporarily unavailable", text):
            return "no more threads can be started; raise the limit of processes (ulimit -u), or use fewer --workers"
    return ""


def explain(error: BaseException) -> str:
    """What an error of a compiler, or a lack of memory or threads, means, as one line; empty for any other error."""
    if line := exhausted(error):
        return line
    for each in _chain(error):
        if re.search(r"(failed to find|no working) c(\+\+)? compiler", str(each), re.IGNORECASE):
            return "there is no C or C++ compiler, which torch.compile and Triton need; install gcc and g++" + _WITHOUT
        if isinstance(each, subprocess.CalledProcessError) and _COMPILERS.search(_program(each)):
            output = each.stderr or each.stdout or b""
            text = output.decode(errors="replace") if isinstance(output, bytes) else output
            cause = next((line.strip() for line in text.splitlines() if "error" in line), str(each))
            headers = "; install Python's headers (python3-dev)" if "Python.h" in text + str(each) else ""
            return f"a compiler failed: {printable(cause[:300])}{headers}{_WITHOUT}"
    # torch is not imported here: if the error is torch's, it has been.
    if isinstance(error, getattr(sys.modules.get("torch._dynamo.exc"), "TorchDynamoException", ())):
        *_, cause = _chain(error)
        lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
        line = f"{type(cause).__name__}: {lines[0]}" if lines else type(cause).__name__
        return f"torch.compile failed: {printable(line[:300])}{_WITHOUT}"
    return ""


def out_of_memory(error: BaseException) -> bool:
    """Whether a GPU's memory was full, also where torch.compile wraps the error."""
    return any(isinstance(each, getattr(sys.modules.get("torch"), "OutOfMemoryError", ())) for each in _chain(error))


_WITHOUT = "; --no-compile trains without torch.compile"
_COMPILERS = re.compile(r"(cc|\+\+|clang|ptxas)[\w.-]*$")  # cc, gcc, g++-12, nvcc and others


def _program(error: subprocess.CalledProcessError) -> str:
    """The program that failed."""
    words = error.cmd.split() if isinstance(error.cmd, str) else [*map(str, error.cmd)]
    return words[0] if words else ""


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__

"""What is freed is kept, and given back when asked; the kernel counts."""

import os
import subprocess
import sys
import textwrap

import pytest

from lightning_sketch.jets import memory

pytestmark = pytest.mark.skipif(memory._of_libc("mallopt") is None, reason="needs glibc")

SCRIPT = """
    import resource
    import torch
    from lightning_sketch.jets import JetTensor
    from lightning_sketch.jets.memory import give_back_freed_memory

    def resident():
        return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() >> 20

    def faults():
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    if {jets}:
        JetTensor(torch.zeros(1), torch.zeros(1, 1, 1, 1))
    for _ in range(6):  # until the heap has found its shape
        torch.ones(16 << 20)
    before = faults()
    for _ in range(4):
        torch.ones(16 << 20)  # 64 MiB
    after, kept = faults(), resident()
    give_back_freed_memory()
    print(after - before, kept - resident())
"""


def run(jets: bool, **environment: str) -> list[int]:
    """Page faults of four allocations of 64 MiB, and MiB given back after them."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    script = textwrap.dedent(SCRIPT).format(jets=jets)
    done = subprocess.run(
        [sys.executable, "-c", script], env={**inherited, **environment}, check=True, capture_output=True, text=True
    )
    return [int(word) for word in done.stdout.split()]


def test_freed_memory_is_kept_and_given_back():
    without, _ = run(jets=False)
    faults, given_back = run(jets=True)
    assert faults < 0.01 * without
    assert given_back > 60


def test_a_configured_allocator_is_left_alone():
    faults, _ = run(jets=True, MALLOC_TRIM_THRESHOLD_="131072")
    assert faults > 1000

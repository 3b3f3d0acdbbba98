"""The report on the machine code of the CUDA kernels, and the gate that refuses what must not be shipped."""

import shutil
import subprocess
from pathlib import Path

import pytest

import ilvae_fast as il
from benchmarks import kernel_report

ROOT = Path(__file__).parent.parent

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed: no machine code")
needs_tools = pytest.mark.skipif(
    bool(kernel_report.missing_tools()),
    reason=f"not installed: {', '.join(kernel_report.missing_tools())} (a CUDA build of torch brings them along)",
)

PLANTED = """
#include "cuda/ptx.cuh"
namespace ilvae::cuda {
template <int n> __global__ void __launch_bounds__(256) tile_kernel(float* x) {}  // no tensor-core instruction
template __global__ void tile_kernel<3>(float*);
__global__ void __launch_bounds__(128) indexed_kernel(float* x, int i) {  // a register array that cannot be one
  float local[200];
  for (int j = 0; j < 200; ++j) local[(j * i) % 200] = x[j];
  for (int j = 0; j < 200; ++j) x[j] = local[j] * local[(j + i) % 200];
}
__global__ void __launch_bounds__(64) product_kernel(float* x, const uint32_t* y) {
  uint32_t a[4] = {y[0], y[1], y[2], y[3]}, b[2] = {y[4], y[5]};
  float c[4] = {};
  ptx::mma_bf16(c, a, b);
  x[0] = c[0];
}
}
"""


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted")
    (folder / "planted.cu").write_text(PLANTED)
    gencode = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in (80, 90)]
    command = ["nvcc", "-std=c++20", *gencode, f"-I{ROOT / 'csrc'}", "-fatbin", "-o", "planted.fatbin", "planted.cu"]
    subprocess.run(command, cwd=folder, check=True)
    return kernel_report.kernels_of(folder / "planted.fatbin")


@needs_nvcc
@needs_tools
def test_the_report_reads_the_machine_code(planted):
    assert {(k.name, k.architecture, k.threads) for k in planted} == {
        (name, architecture, threads)
        for name, threads in (("tile_kernel<3>", 256), ("indexed_kernel", 128), ("product_kernel", 64))
        for architecture in (80, 90)
    }
    products = [k for k in planted if k.name == "product_kernel"]
    assert all(k.tensor_core == {"HMMA.16816.F32.BF16": 1} for k in products)
    assert all(k.blocks_per_multiprocessor == 32 and k.occupancy == 1.0 for k in products)


@needs_nvcc
@needs_tools
def test_the_gate_refuses_local_memory_and_missing_tensor_cores(planted):
    refused = kernel_report.violations(planted)
    assert len(refused) == 4, refused
    for architecture in (80, 90):
        assert f"tile_kernel<3> on sm_{architecture}: no tensor-core instruction" in refused
        assert any(line.startswith(f"indexed_kernel on sm_{architecture}: local memory (") for line in refused)


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "blocks"),
    [
        (32, 256, 0, 8),
        (255, 256, 0, 1),
        (128, 256, 0, 2),
        (64, 128, 100_000, 1),
        (64, 128, 166_912, 1),
        (64, 128, 170_000, 0),
    ],
)
def test_occupancy_on_an_a100(registers, threads, shared, blocks):
    kernel = kernel_report.Kernel("", "f", 80, registers, 0, 0, 0, threads=threads, dynamic_shared=shared)
    assert kernel.blocks_per_multiprocessor == blocks


def test_names_are_shortened():
    name = "void ilvae::cuda::tile_kernel<(ilvae::cuda::Operands)2, 32, 16, 1>(ilvae::cuda::FusedCall)"
    assert kernel_report.short_name(name) == "tile_kernel<Operands 2, 32, 16, 1>"
    name = "void ilvae::cuda::streamed_kernel<(ilvae::cuda::Operands)0, 256, 64, true>(ilvae::cuda::FusedCall)"
    assert kernel_report.short_name(name) == "streamed_kernel<Operands 0, 256, 64, true>"
    assert kernel_report.short_name("ilvae::cuda::reduce_kernel(ilvae::cuda::Reduction)") == "reduce_kernel"


@pytest.mark.slow
@needs_tools
@pytest.mark.skipif(not il.build_info()["cuda"], reason="the extension was built without CUDA")
def test_shipped_kernels_use_no_local_memory_and_the_tensor_cores_they_are_meant_for():
    kernels = kernel_report.kernels_of(kernel_report.built_library())
    wanted = [a.removeprefix("sm_") for a in il.build_info()["cuda_architectures"].split() if a.startswith("sm_")]
    assert {str(k.architecture) for k in kernels} >= set(wanted)
    assert any(k.wants_tensor_cores for k in kernels)
    assert not kernel_report.violations(kernels)

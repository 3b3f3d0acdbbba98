"""Predicted times of the CUDA kernels: python -m benchmarks.model [--gpu A100|H100|H200]

A model, not a measurement: every figure it prints is labelled predicted, and the acceptance run prints it beside what
was measured. Expected to be right to 40 % for the fused route and to 20 % for the matmul route.

Fused route, resident weights (tile kernel, one block per SM, tiles dealt over persistent blocks; symbols as in
docs/mathematics.md):

    tile   = (mma * clocks + R S * instructions / 128) * 1.15 + 150 * barriers            clocks
    launch = 2.5 us + weights / 42 GB/s + ceil(tiles / SMs) * tile
    gradients of parameters: + partial sums written at memory speed + a second launch that reads them from L2

where an mma costs the larger of what the tensor cores take and what shared memory takes to deliver its operands, and
a row and unit cost 40 (map) or 61 (training terms) instructions outside the products. Streamed weights: every tile
takes what it computes or what its share of the L2 cache takes to deliver the weights twice, whichever is more, and a
barrier for each slab; training terms write operands for K products, which follow. Matmul route: for every product
max(flops / rate, bytes / bandwidth), for every pointwise pass bytes / bandwidth, each at least a launch.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from math import ceil

PRECISIONS = ("float32", "tf32", "bfloat16")


@dataclass(frozen=True)
class GPU:
    """Rates that a good kernel reaches, not those of the data sheet, except `flops`: dense peak."""

    name: str
    multiprocessors: int
    clock: float  # Hz, under load
    bandwidth: float  # bytes/s
    l2_bandwidth: float
    flops: dict[str, float]  # of matrix products by precision
    mma_clocks: float  # of an SM for an m16n8k16 in 16 bits or an m16n8k8 in tf32, by mma.sync
    launch: float = 2e-6  # seconds between kernels of a graph
    matmul_efficiency: float = 0.85
    shared_bytes: int = 232448  # of a block, at most
    fill: float = 42e9  # bytes/s at which one SM fills its shared memory


_HOPPER = {"float32": 67e12, "tf32": 400e12, "bfloat16": 800e12}
_AMPERE = {"float32": 19.5e12, "tf32": 156e12, "bfloat16": 312e12}
GPUS = {
    "A100": GPU("A100", 108, 1.41e9, 1.7e12, 4.0e12, _AMPERE, 2.0, shared_bytes=166912),
    "H100": GPU("H100", 132, 1.7e9, 3.0e12, 5.5e12, _HOPPER, 1.63),
    "H200": GPU("H200", 132, 1.7e9, 4.3e12, 5.5e12, _HOPPER, 1.63),
}


@dataclass(frozen=True)
class Network:
    width: int  # d
    hidden: tuple[int, ...]  # n_1 .. n_K
    batch: int  # N
    latent: int | None = None  # m, of an injected input

    @property
    def input(self) -> int:
        return self.latent or self.width

    @property
    def units(self) -> int:
        return sum(self.hidden)

    @property
    def parameters(self) -> int:  # with gradients: A, b, W_k, w, L
        hidden = sum(a * b for a, b in zip(self.hidden, (*self.hidden[1:], 1), strict=True))
        return (self.units + 1) * (self.width + 1) + hidden + 1

    def __str__(self) -> str:
        injected = f"{self.latent} -> " if self.latent else ""
        return f"{injected}{self.width}, {self.hidden[0]}x{len(self.hidden)}, N {self.batch}"


def element_bytes(precision: str) -> int:
    return 2 if precision == "bfloat16" else 4


# ---- fused route


def _padded(n: int, sizes: tuple[int, ...]) -> int:
    for size in sizes:
        if n <= size:
            return size
    raise ValueError(f"a width of {n} is beyond the fused route: at most {sizes[-1]}")


def _leading(columns: int) -> int:
    return (ceil(columns / 8) | 1) * 8


@dataclass(frozen=True)
class Tile:
    """How csrc/cuda/fused.h cuts the work of a block."""

    n: int
    d: int
    layers: int
    training: bool
    row_groups: int
    column_groups: int
    element: int
    streamed: bool = False

    @classmethod
    def resident(cls, network: Network, precision: str, training: bool, compiled: bool = True) -> Tile | None:
        """The tile with resident weights that holds the network, if it is compiled: csrc/cuda/fused_shapes.h."""
        n, layers = max(network.hidden), len(network.hidden)
        if compiled and (layers > 4 or n > 128 or network.width > (64 if n <= 64 else 128)):
            return None
        if compiled and training and n > 64 and (layers > 2 or (layers == 2 and network.width > 64)):
            return None
        n = _padded(n, (32, 64, 128))
        one = precision != "bfloat16" and (n == 128 or (n == 64 and training and layers >= 3))
        d = _padded(network.width, (16, 64) if n < 128 else (32, 64, 128))
        groups = 2 if n == 32 else 8 if one else 4
        return cls(n, d, layers, training, 1 if one else 2, groups, element_bytes(precision))

    @classmethod
    def streaming(cls, network: Network, precision: str, training: bool) -> Tile:
        """The tile with streamed weights."""
        n, d = _padded(max(network.hidden), (128, 256)), _padded(network.width, (64, 256))
        element = element_bytes(precision)
        groups = (1, n // 32) if element == 4 else (2, 4)
        return cls(n, d, len(network.hidden), training, *groups, element, streamed=True)

    @classmethod
    def of(cls, network: Network, precision: str, training: bool, gpu: GPU) -> Tile:
        for tile in (cls.resident(network, precision, training), cls.streaming(network, precision, training)):
            if tile and tile.layers <= 4 and tile.shared_bytes <= gpu.shared_bytes:
                return tile
        raise ValueError(f"{network} is beyond the fused route on an {gpu.name}")

    @property
    def rows(self) -> int:
        return 16 * self.row_groups * (1 if self.training else 2)

    @property
    def slab_depth(self) -> int:
        return 16 if self.element == 4 else 32

    @property
    def weight_bytes(self) -> int:
        """Of the weights in shared memory: all of them, or two slabs."""
        if self.streamed:
            up, down = self.n * _leading(self.slab_depth), self.slab_depth * _leading(max(self.n, self.d))
            return 2 * self.element * max(up, down)
        return self.element * self.n * (_leading(self.d) + (self.layers - 1) * _leading(self.d + self.n))

    @property
    def shared_bytes(self) -> int:
        rows, threads = 32 * self.row_groups, 32 * self.row_groups * self.column_groups
        if self.streamed:
            tile = _leading(self.n if self.element == 4 else max(self.n, self.d))
        else:
            tile = (self.layers if self.training else 2) * _leading(self.n)
        stashed = 8 if self.streamed and self.element == 2 else 16
        stash = (self.layers - 1) * (self.n // (8 * self.column_groups)) * 2 * stashed * threads
        floats = (self.layers + 1) * self.n + self.d + (3 + self.column_groups) * rows + 4
        return rows * (_leading(self.d) + tile) * self.element + self.weight_bytes + stash + 4 * floats

    def products(self, columns: int) -> int:
        """mma instructions of a tile, with so many columns of the input."""
        n, d, k = self.n, columns, 16 if self.element == 2 else 8
        stacked = 32 * self.row_groups
        up = stacked * n * (d + (self.layers - 1) * (d + n))
        out = (stacked // 2 if self.training else stacked) * self.layers * n * d
        down = stacked * (self.layers - 1) * n * n + out
        weights = up if self.training and not self.streamed else 0
        return (up + down + weights) // (16 * 8 * k)


def fused_seconds(network: Network, precision: str, gpu: GPU, training: bool) -> float:
    """The map, or the training terms with the reduction of their partial sums."""
    tile = Tile.of(network, precision, training, gpu)
    per_warp = tile.n // (8 * tile.column_groups)  # n-tiles
    wavefronts = 4 / per_warp + 1  # of shared memory for the operands of one product
    per_product = max((3 if precision == "float32" else 1) * gpu.mma_clocks, wavefronts)
    pointwise = tile.rows * tile.n * tile.layers * (61 if training else 40) / 128
    columns = 16 * ceil(network.width / 16) if tile.streamed else tile.d
    clocks = (tile.products(columns) * per_product + pointwise) * 1.15
    tiles = ceil(network.batch / tile.rows)
    blocks = min(tiles, gpu.multiprocessors)
    rounds = ceil(tiles / blocks)
    if not tile.streamed:
        clocks += 150 * (3 * tile.layers + 1)
        seconds = 2.5e-6 + tile.weight_bytes / gpu.fill + rounds * clocks / gpu.clock
        if training:
            partial = 4.0 * blocks * network.parameters
            seconds += partial / gpu.bandwidth + gpu.launch + partial / gpu.l2_bandwidth
        return seconds
    hidden = sum(a * b for a, b in zip(network.hidden, network.hidden[1:], strict=False))
    weights = network.width * network.units + hidden
    slabs = 2 * weights / (tile.slab_depth * tile.n)
    arriving = 2.0 * weights * tile.element * gpu.multiprocessors / gpu.l2_bandwidth
    seconds = 2.5e-6 + rounds * max((clocks + 150 * (slabs + 2 * tile.layers)) / gpu.clock, arriving)
    if training:
        written = 2 * network.width + 2 * (network.units - network.hidden[-1]) + 2 * network.units
        seconds = max(seconds, network.batch * written * tile.element / gpu.bandwidth)
        rate = gpu.flops[precision] * gpu.matmul_efficiency
        pairs = [(network.width, network.units), *zip(network.hidden, network.hidden[1:], strict=False)]
        for a, b in pairs:
            traffic = 2.0 * network.batch * (a + b) * tile.element / gpu.bandwidth
            seconds += max(gpu.launch, 4.0 * network.batch * a * b / rate, traffic)
        seconds += 2 * gpu.launch
    return seconds


# ---- matmul route


def matmul_seconds(network: Network, precision: str, gpu: GPU, training: bool) -> float:
    """The map, or the training terms from saved pre-activations and adjoints."""
    rows, d, m, units = network.batch, network.width, network.input, network.units
    element = element_bytes(precision)
    rate = gpu.flops[precision] * gpu.matmul_efficiency

    def pass_over(columns: float) -> float:  # so many columns of the batch are read and written
        return max(gpu.launch, rows * columns * element / gpu.bandwidth)

    def product(inner: int, outer: int, columns: float) -> float:
        return max(2.0 * rows * inner * outer / rate, pass_over(columns))

    pairs = list(zip(network.hidden, network.hidden[1:], strict=False))  # (n_{k-1}, n_k)
    first, last = network.hidden[0], network.hidden[-1]
    if not training:
        seconds = product(m, units + 1, m + units)  # P = x A^T
        seconds += pass_over(2 * first + 2 * d)  # h_1, L x
        seconds += sum(product(a, b, a + 2 * b) for a, b in pairs)  # a_k += h W^T
        seconds += sum(pass_over(2 * n) for n in network.hidden[1:-1])  # h_k
        seconds += pass_over(2 * last)  # turn
        seconds += sum(product(a, b, a + b) + pass_over(3 * a) for a, b in pairs)  # g = D W; D
        return seconds + product(units + 1, d, units + 2 * d)  # T += D A
    seconds = product(d, units + 1, d + units)  # P' = v A^T
    seconds += pass_over(4 * first + 3 * m)  # h_1, h'_1, L (v + u x)
    seconds += sum(product(a, b, a + 2 * b) for a, b in pairs)  # a'_k += h' W^T
    seconds += sum(pass_over(4 * n) for n in network.hidden[1:-1])
    seconds += pass_over(4 * last)
    seconds += sum(product(a, b, a + b) + pass_over(6 * a) for a, b in pairs)  # g' = D' W; D', D
    seconds += product(units + 1, m, units + 2 * m)  # grad_x += D' A
    seconds += sum(product(2 * a, b, 2 * (a + b)) for a, b in pairs)  # dW_k
    seconds += product(units + 1, m, units + m) + product(units + 1, d, units + d)  # dA = D'^T x + D^T v
    return seconds + gpu.launch  # sums of partials


def seconds(network: Network, precision: str, gpu: GPU, route: str) -> tuple[float, float]:
    """Predicted seconds of the map and of the training terms."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision: got {precision!r}, wanted one of {', '.join(PRECISIONS)}")
    if route not in ("fused", "matmul"):
        raise ValueError(f"route: got {route!r}, wanted fused or matmul")
    predict = fused_seconds if route == "fused" else matmul_seconds
    return predict(network, precision, gpu, False), predict(network, precision, gpu, True)


def gpu_of(name: str) -> GPU | None:
    """The model of a device named as torch names it ("NVIDIA H100 80GB HBM3"), or None."""
    return next((gpu for gpu in GPUS.values() if gpu.name in name), None)


CASES = [
    (Network(2, (32, 32), 128), "fused"),
    (Network(2, (64, 64), 512), "fused"),
    (Network(32, (128, 128), 4096), "fused"),
    (Network(64, (256, 256, 256), 65536), "fused"),
    (Network(64, (256, 256, 256), 65536), "matmul"),
    (Network(784, (1024, 1024), 4096, latent=64), "matmul"),
    (Network(784, (1024, 1024), 65536, latent=64), "matmul"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", choices=GPUS, default="H100")
    gpu = GPUS[parser.parse_args().gpu]
    print(f"PREDICTED microseconds on an {gpu.name}, map + training terms (no figure here was measured)")
    print(f"{'d, hidden, N':>24s} {'route':>7s}" + "".join(f"{p:>18s}" for p in PRECISIONS))
    for network, route in CASES:
        cells = []
        for precision in PRECISIONS:
            there, back = seconds(network, precision, gpu, route)
            cells.append(f"{f'{there * 1e6:.0f} + {back * 1e6:.0f}':>18s}")
        print(f"{network!s:>24s} {route:>7s}" + "".join(cells))


if __name__ == "__main__":
    main()

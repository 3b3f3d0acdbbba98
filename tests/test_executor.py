"""The host executor: every detector finds the fault planted for it, and nothing in sound kernels."""

import numpy as np
import pytest

from executor import ExecutorError, Program, build_all, same_for_all_orders

SEEDS = range(12)


@pytest.fixture(scope="module")
def faults():
    programs = {mode: Program("faults", mode) for mode in ("plain", "races", "memory")}
    build_all(programs.values(), workers=2)
    return programs


@pytest.fixture(scope="module")
def instructions():
    return Program("instructions")


def floats(n, fill=np.nan):
    return np.full(n, fill, np.float32)


# ---- sound kernels


@pytest.mark.parametrize("mode", ["plain", "races", "memory"])
def test_sound_kernels_are_right_in_every_mode_and_order(faults, mode):
    x = np.random.default_rng(0).standard_normal(3 * 96).astype(np.float32)
    for seed in SEEDS if mode != "memory" else (0, 1):
        y = floats(3 * 96)
        faults[mode].run_reverse(3, 96, x, y, 1, seed)
        np.testing.assert_array_equal(y.reshape(3, 96), x.reshape(3, 96)[:, ::-1])
        y = floats(64)
        faults[mode].run_reverse_in_warp(x, y, 1, seed)
        np.testing.assert_array_equal(y.reshape(2, 32), x[:64].reshape(2, 32)[:, ::-1])
        long, y = np.arange(256 * 5, dtype=np.float32), floats(64)
        faults[mode].run_copies(long, y, 5, 0, 0, seed)
        np.testing.assert_array_equal(y, np.roll(long.reshape(5, 64, 4).sum((0, 2)), -1))
        y = np.zeros(99, np.uint16)
        faults[mode].run_blocks_write_neighbours(y, seed)
        np.testing.assert_array_equal(y, np.tile(np.arange(33), 3))


# ---- data races


def test_a_missing_block_barrier_is_a_race_and_shows_as_nan(faults):
    x, y = np.ones(64, np.float32), floats(64)
    with pytest.raises(ExecutorError, match=r"data race: .* shared memory .* at .*faults\.cpp:\d+"):
        faults["races"].run_reverse(1, 64, x, y, 0, 1)
    faults["plain"].run_reverse(1, 64, x, y, 0, 1)
    assert np.isnan(y).any()


def test_a_barrier_that_is_taken_away_is_missing_for_that_program_alone(faults):
    source = faults["races"].source
    lines = source.read_text().splitlines()
    (line,) = (number for number, text in enumerate(lines, 1) if "if (barrier) __syncthreads();" in text)
    without = Program("faults", "races", without_barrier=(source.name, line))
    x, y = np.ones(64, np.float32), floats(64)
    for _ in range(2):
        with pytest.raises(ExecutorError, match="data race"):
            without.run_reverse(1, 64, x, y, 1, 1)
        faults["races"].run_reverse(1, 64, x, y, 1, 1)


def test_a_missing_warp_barrier_is_a_race_even_where_the_order_hides_it(faults):
    x = np.ones(64, np.float32)
    for seed in SEEDS:
        with pytest.raises(ExecutorError, match="data race"):
            faults["races"].run_reverse_in_warp(x, floats(64), 0, seed)


@pytest.mark.parametrize("fault", ["early", "refill"])
def test_mistimed_asynchronous_copies_are_races(faults, fault):
    x, y = np.arange(256 * 5, dtype=np.float32), floats(64)
    with pytest.raises(ExecutorError, match="data race"):
        faults["races"].run_copies(x, y, 5, int(fault == "early"), int(fault == "refill"), 1)


def test_copies_happen_at_the_wait(faults):
    x, y = np.arange(256 * 5, dtype=np.float32), floats(64)
    faults["plain"].run_copies(x, y, 5, 1, 0, 0)  # reads a stage before waiting for it
    assert np.isnan(y).all()


def test_blocks_that_write_the_same_memory_race(faults):
    with pytest.raises(ExecutorError, match=r"data race: thread 0 of block \d writes address"):
        faults["races"].run_blocks_write_the_same(floats(1), 1)


def test_a_call_after_a_fault_starts_afresh(faults):
    with pytest.raises(ExecutorError, match="divergent"):
        faults["plain"].run_divergent_barrier(floats(64), 1)
    x, y = np.arange(64, dtype=np.float32), floats(64)
    faults["plain"].run_reverse(1, 64, x, y, 1, 1)
    np.testing.assert_array_equal(y, x[::-1])


# ---- divergence


@pytest.mark.parametrize("mode", ["plain", "races", "memory"])
@pytest.mark.parametrize("seed", [0, 3])
def test_divergent_barriers(faults, mode, seed):
    with pytest.raises(
        ExecutorError, match=r"divergent block barrier: thread \d+ of block 0 waits at the block barrier"
    ):
        faults[mode].run_divergent_barrier(floats(64), seed)
    with pytest.raises(ExecutorError, match=r"divergent block barrier: .* has left the kernel"):
        faults[mode].run_barrier_after_return(floats(64), seed)
    with pytest.raises(ExecutorError, match=r"divergent warp: .* shfl\.xor at faults\.cpp:\d+ for lanes f{8}"):
        faults[mode].run_shuffle_in_a_branch(floats(64), seed)


# ---- memory


def test_reading_what_nobody_wrote(faults):
    y = floats(64, 0)
    faults["plain"].run_reads_what_nobody_wrote(y, 1)
    assert np.isnan(y[0]), "shared memory is NaN before each block"
    with pytest.raises(ExecutorError, match=r"uninitialised: thread 0 .* shared memory \+ 0 at .*faults"):
        faults["races"].run_reads_what_nobody_wrote(y, 1)


@pytest.mark.parametrize("beyond", ["shared", "global", "local"])
def test_out_of_bounds(faults, beyond):
    x, y = floats(64, 1), floats(64)
    if beyond == "local":
        index = (np.arange(64) % 8).astype(np.int32)
        faults["memory"].run_beyond_a_local_array(index, y, 1)
        np.testing.assert_array_equal(y, index)
        index[5] = 8
        with pytest.raises(ExecutorError, match=r"stack-buffer-overflow|dynamic-stack-buffer-overflow"):
            faults["memory"].run_beyond_a_local_array(index, y, 1)
        return
    with pytest.raises(ExecutorError, match=r"heap-buffer-overflow[\s\S]*faults\.cpp"):
        faults["memory"].run_one_beyond(x, y, int(beyond == "shared"), int(beyond == "global"), 1)


def test_misaligned_vector_access(faults):
    x, y = floats(4 * 32 + 4, 1), floats(32)
    faults["memory"].run_misaligned(x, y, 0, 1)
    with pytest.raises(ExecutorError, match="misaligned address"):
        faults["memory"].run_misaligned(x, y, 1, 1)


# ---- order


def test_dependence_on_the_order_of_threads(faults):
    x = np.random.default_rng(0).standard_normal(64).astype(np.float32)

    def total(seed):
        y = np.zeros(1, np.float32)
        faults["races"].run_sum_in_any_order(x, y, seed)  # atomic: no race
        return [y]

    with pytest.raises(ExecutorError, match="order dependence: result 0 differs"):
        same_for_all_orders(total, SEEDS)

    def reverse(seed):
        y = floats(64)
        faults["plain"].run_reverse(1, 64, x, y, 1, seed)
        return [y]

    same_for_all_orders(reverse, SEEDS)


# ---- instructions


def bits(x, kind):
    """Operand bits of bf16 (0), fp16 (1) or tf32 (2), and the values they stand for."""
    if kind == 1:
        return x.astype(np.float16).view(np.uint16), x.astype(np.float16).astype(np.float64)
    cut = x.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000 if kind == 0 else 0xFFFFE000)
    values = cut.view(np.float32).astype(np.float64)
    return ((cut >> 16).astype(np.uint16) if kind == 0 else x.astype(np.float32)), values


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_mma_has_the_fragments_of_the_manual_and_truncates(instructions, kind):
    k = 8 if kind == 2 else 16
    generator = np.random.default_rng(kind)
    a_bits, a = bits(generator.integers(-8, 9, (16, k)), kind)
    b_bits, b = bits(generator.integers(-8, 9, (k, 8)), kind)
    c = np.arange(128, dtype=np.float32).reshape(16, 8)
    expected = c + a @ b
    instructions.multiply(kind, a_bits, b_bits, c, 3)
    np.testing.assert_array_equal(c, expected)  # small integers: exact

    # positive sums are never rounded up
    a_bits, a = bits(generator.random((16, k)) + 0.5, kind)
    b_bits, b = bits(generator.random((k, 8)) + 0.5, kind)
    c = generator.random((16, 8)).astype(np.float32) * 4096
    exact = c + a @ b
    instructions.multiply(kind, a_bits, b_bits, c, 3)
    error = (exact - c) / np.spacing(c)
    assert error.min() >= 0
    assert 0.3 < error.mean() < 4, "a bias of some units in the last place for two truncated partial sums"
    assert error.max() < 6


def test_mma_carries_infinities_and_nan(instructions):
    a = np.ones((16, 8), np.float32)
    a[3, 2], a[4, 1] = np.inf, np.nan
    c = np.zeros((16, 8), np.float32)
    instructions.multiply(2, a, np.ones((8, 8), np.float32), c, 0)
    assert np.isposinf(c[3]).all()
    assert np.isnan(c[4]).all()
    assert (c[5] == 8).all()


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(instructions, transposed):
    matrices = np.arange(4 * 64, dtype=np.uint16)
    r = np.zeros((32, 4), np.uint32)
    instructions.load_matrices(int(transposed), matrices, r, 5)
    m = matrices.reshape(4, 8, 8)
    m = m.transpose(0, 2, 1) if transposed else m
    for lane in range(32):
        for i in range(4):
            low, high = m[i, lane // 4, 2 * (lane % 4)], m[i, lane // 4, 2 * (lane % 4) + 1]
            assert r[lane, i] == int(low) | int(high) << 16


def test_conversions(instructions):
    import torch

    generator = np.random.default_rng(0)
    x = np.concatenate(
        [
            generator.standard_normal(500) * 10.0 ** generator.integers(-12, 6, 500),
            [0.0, 1.0, 65504, 65519, 65520, 1e-7, 3e-8, 2.9e-8, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11],
            [np.inf, -np.inf, 1 + 2**-11 + 2**-12],
        ]
    ).astype(np.float32)
    n = len(x)
    tf32, bf16, fp16 = (np.zeros(n, np.uint32) for _ in range(3))
    from_bf16, from_fp16, power, reciprocal = (floats(n) for _ in range(4))
    instructions.convert(n, x, tf32, bf16, fp16, from_bf16, from_fp16, power, reciprocal)

    both = torch.from_numpy(x).bfloat16().float().numpy()
    finite = np.isfinite(x)
    np.testing.assert_array_equal(from_bf16[finite], both[finite])
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(from_fp16, x.astype(np.float16).astype(np.float32))
    np.testing.assert_array_equal(fp16 >> 16, (fp16 & 0xFFFF) ^ 0x8000)
    np.testing.assert_array_equal(bf16 >> 16, (bf16 & 0xFFFF) ^ 0x8000)
    rounded = tf32.view(np.float32)
    assert (tf32 & 0x1FFF == 0)[finite].all()
    assert (abs(rounded[finite] - x[finite]) <= abs(x[finite]) * 2.0**-11).all()
    assert rounded[x == np.float32(1 + 2**-11)] == np.float32(1 + 2**-10), "ties go away from zero"
    with np.errstate(all="ignore"):
        for approximate, exact in ((power, np.exp2(x.astype(np.float64))), (reciprocal, 1 / x.astype(np.float64))):
            normal = (np.abs(exact) > 1.2e-38) & (np.abs(exact) < 3e38)
            assert (np.abs(approximate / exact - 1)[normal] < 2.0**-22).all()
            assert (approximate[np.abs(exact) < 1e-38] == 0).all()


@pytest.mark.parametrize("seed", [0, 9])
def test_shuffles(instructions, seed):
    out = floats((6, 64))
    instructions.shuffles(seed, out)
    i = np.arange(64)
    lane, base = i % 32, i // 32 * 32
    np.testing.assert_array_equal(out[0], base + (lane ^ 5))
    np.testing.assert_array_equal(out[1], np.where(lane + 3 < 32, i + 3, i))
    np.testing.assert_array_equal(out[2], np.where(lane % 8 >= 3, i - 3, i))
    np.testing.assert_array_equal(out[3], i // 4 * 4 + 1)
    np.testing.assert_array_equal(out[4], 3)
    np.testing.assert_array_equal(out[5], np.where(i < 32, 1, 2))

// The fused kernels of one shape (KIND, WIDTH, INPUT, LAYERS as in launch_tiles; STREAMED: with streamed weights,
// LAYERS 1 for any number), called as the launchers call them.
#include <vector>

#include "cuda/reduce.cuh"
#if STREAMED
#include "cuda/pack.cuh"
#include "cuda/streamed.cuh"
#else
#include "cuda/fused.cuh"
#endif

using namespace ilvae;
using namespace ilvae::cuda;

extern "C" {

// What host and device compute of shared memory.
int64_t shared_bytes(int64_t layers) {
  return STREAMED ? streamed_layout(Operands::KIND, WIDTH, INPUT, int(layers)).total
                  : layout(Operands::KIND, WIDTH, INPUT, int(layers), LAYERS > 0).total;
}

// sizes: K, d, m, N, element type, output type, type of L, n_1 .. n_K; activations: K + 1 codes. weights: W_2 .. W_K,
// w, one after another. gradients: [dA | db | dW .. dw | dL] in the element type but dL, a float of its own; partial:
// scratch. Streamed, of dA there is the last row alone, of the weights dw; what the products need are stacked_x and so
// on (FusedCall), their rows aligned_columns apart. Returns the matrices that had to be packed.
int64_t fused(const int64_t* sizes, const int64_t* activations, const double* parameters, const void* x,
              const void* skip, const void* bias, const unsigned char* weights, const void* constant, const void* v,
              const void* u, void* potential, void* map, void* grad_x, unsigned char* gradients, float* grad_constant,
              float* partial, void* stacked_x, void* stacked_h, void* stacked_d, int64_t blocks, int64_t seed) {
  FusedCall c;
  c.layers = int(sizes[0]), c.width = int(sizes[1]), c.input = int(sizes[2]), c.rows = sizes[3];
  const auto type = static_cast<DType>(sizes[4]);
  c.output = static_cast<DType>(sizes[5]);
  const int64_t bytes = type == DType::float32 ? 4 : 2;
  for (int k = 0; k < c.layers; ++k) c.widths[k] = int(sizes[7 + k]), c.first[k] = c.units, c.units += c.widths[k];
  for (int k = 0; k <= c.layers; ++k) {
    c.kind[k] = static_cast<ActivationKind>(activations[k]);
    c.parameter[k] = Parameter<float>(parameters[k]);
  }
  c.x = {x, c.input, type};
  c.skip_weight = {skip, c.width, type};
  c.bias = {bias, 1, type};
  for (int k = 0; k < c.layers; ++k) {
    c.weights[k] = {weights, c.widths[k], type};
    weights += bytes * c.widths[k] * (k + 1 < c.layers ? c.widths[k + 1] : 1);
  }
  c.constant = {constant, 1, static_cast<DType>(sizes[6])};
  c.v = {v, c.width, type};
  c.u = {u, 1, type};
  c.potential = potential, c.map = map, c.grad_x = grad_x, c.partial = partial;
  Packing packing;
#if STREAMED
  c.stacked = LAYERS > 0;
  c.stacked_x = stacked_x, c.stride_x = aligned_columns(c.width);
  c.stacked_h = stacked_h, c.stride_h = aligned_columns(c.units - c.widths[c.layers - 1]);
  c.stacked_d = stacked_d, c.stride_d = aligned_columns(c.units);
  int64_t packed = 0;
  pack_streamed(Operands::KIND, c, nullptr, packed);
  std::vector<uint4> workspace(packed / 16, uint4{~0u, ~0u, ~0u, ~0u});
  packed = 0;
  packing = pack_streamed(Operands::KIND, c, reinterpret_cast<unsigned char*>(workspace.data()), packed);
  if constexpr (!wide(Operands::KIND)) {  // rows in float32 always start at 4 bytes
    if (packing.rows > 0) {
      executor::launch(dim3((packing.rows + 7) / 8), dim3(pack_threads), 0, seed,
                       [&] { pack_kernel<Operands::KIND>(packing); });
    }
  }
  const int rows = streamed_tile_rows(Operands::KIND, LAYERS > 0);
  c.tiles = (c.rows + rows - 1) / rows;
  executor::launch(dim3(blocks), dim3(streamed_threads(Operands::KIND, WIDTH)), shared_bytes(c.layers), seed,
                   [&] { streamed_kernel<Operands::KIND, WIDTH, INPUT, (LAYERS > 0)>(c); });
#else
  const int rows = tile_rows(Operands::KIND, WIDTH, LAYERS);
  c.tiles = (c.rows + rows - 1) / rows;
  executor::launch(dim3(blocks), dim3(block_threads(Operands::KIND, WIDTH, LAYERS)), shared_bytes(c.layers), seed,
                   [&] { tile_kernel<Operands::KIND, WIDTH, INPUT, LAYERS>(c); });
#endif
  if (LAYERS == 0) return packing.matrices;
  auto r = reduction_of(c, int(blocks));
  int64_t start = 0;
  for (int s = 0; s < r.segments; ++s) {
    r.segment[s].data = gradients + bytes * start;
    r.segment[s].type = type;
    start = r.segment[s].end;
  }
  r.segment[r.segments - 1].data = grad_constant;
  r.segment[r.segments - 1].type = DType::float32;
  executor::launch(dim3(reduction_blocks(r)), dim3(reduction_threads), reduction_shared_bytes, seed,
                   [&] { reduce_kernel(r); });
  return packing.matrices;
}
}

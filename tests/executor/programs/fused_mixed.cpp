// The fused kernels of one shape with arrays of any types and strides; gradients are left as the sums of one block.
#include "cuda/fused.cuh"

using namespace ilvae;
using namespace ilvae::cuda;

// sizes: K, d, m, N, n_1 .. n_K. formats: type and row stride of x, A, b, L, v, u, W_2 .. W_K, w; arrays: their data.
// All activations are softplus, the output's the identity; outputs in float32.
extern "C" void fused_mixed(const int64_t* sizes, const int64_t* formats, const void* x, const void* skip,
                            const void* bias, const void* constant, const void* v, const void* u, const void* first,
                            const void* second, float* potential, float* map, float* grad_x, float* sums,
                            int64_t seed) {
  FusedCall c;
  c.layers = int(sizes[0]), c.width = int(sizes[1]), c.input = int(sizes[2]), c.rows = sizes[3];
  for (int k = 0; k < c.layers; ++k) {
    c.widths[k] = int(sizes[4 + k]), c.first[k] = c.units, c.units += c.widths[k];
    c.kind[k] = ActivationKind::softplus;
    c.parameter[k] = Parameter<float>(1.0);
  }
  c.kind[c.layers] = ActivationKind::identity;
  const void* data[] = {x, skip, bias, constant, v, u, first, second};
  Array arrays[8];
  for (int i = 0; i < 6 + c.layers; ++i) arrays[i] = {data[i], formats[2 * i + 1], static_cast<DType>(formats[2 * i])};
  c.x = arrays[0], c.skip_weight = arrays[1], c.bias = arrays[2], c.constant = arrays[3];
  c.v = arrays[4], c.u = arrays[5];
  for (int k = 0; k < c.layers; ++k) c.weights[k] = arrays[6 + k];
  c.potential = potential, c.map = map, c.grad_x = grad_x, c.partial = sums;
  const int rows = tile_rows(Operands::KIND, WIDTH, LAYERS);
  c.tiles = (c.rows + rows - 1) / rows;
  executor::launch(dim3(1), dim3(block_threads(Operands::KIND, WIDTH, LAYERS)),
                   layout(Operands::KIND, WIDTH, INPUT, c.layers, LAYERS > 0).total, seed,
                   [&] { tile_kernel<Operands::KIND, WIDTH, INPUT, LAYERS>(c); });
}

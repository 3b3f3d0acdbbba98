// A decoder in a program without Python: loads a package that export.py wrote, and decodes latents of 0.5.
//
//     ./decode decoder.pt2 ROWS WIDTH
//
// prints the outputs of each row in a line.
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <cstdlib>
#include <iostream>

int main(int argc, char** argv) {
  if (argc != 4) {
    std::cerr << "usage: " << argv[0] << " PACKAGE ROWS WIDTH\n";
    return 2;
  }
  const c10::InferenceMode guard;
  torch::inductor::AOTIModelPackageLoader decoder(argv[1]);
  const auto x = decoder.run({torch::full({std::atol(argv[2]), std::atol(argv[3])}, 0.5f)}).at(0).contiguous();
  const auto* value = x.const_data_ptr<float>();
  std::cout.precision(9);
  for (int64_t row = 0; row < x.size(0); ++row) {
    for (int64_t k = 0; k < x.numel() / x.size(0); ++k) std::cout << *value++ << ' ';
    std::cout << '\n';
  }
}

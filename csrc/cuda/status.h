// How launchers report: the return code of the first CUDA call that failed, and which it was.
#pragma once

namespace ilvae::cuda {

struct Status {
  int code = 0;  // cudaError_t; 0: fine
  const char* what = "";

  explicit operator bool() const { return code != 0; }  // trouble
};

// The text of a code, as cudaGetErrorString.
const char* describe(int code);

}  // namespace ilvae::cuda

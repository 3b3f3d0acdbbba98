# The nvcc that CUDA kernels are compiled with. CMake's own check_language(CUDA) takes any that works, and of one that
# does not it only says that there is none.

# Sets `compiler_out` to an nvcc that works and has the CUDA major version of torch, or `trouble_out` to why there is
# none; the other of the two is left empty.
function(find_nvcc torch_version torch_cuda_version compiler_out trouble_out)
  set(${compiler_out} "" PARENT_SCOPE)
  set(${trouble_out} "" PARENT_SCOPE)
  if(CMAKE_CUDA_COMPILER)
    set(nvcc "${CMAKE_CUDA_COMPILER}")
  elseif(DEFINED ENV{CUDACXX})
    set(nvcc "$ENV{CUDACXX}")
  else()
    find_program(nvcc nvcc HINTS ENV CUDAToolkit_ROOT ENV CUDA_PATH ENV CUDA_HOME PATH_SUFFIXES bin
      NO_CMAKE_SYSTEM_PATH NO_CACHE)  # an nvcc that is not on PATH has not been chosen
  endif()
  if(NOT nvcc)
    set(${trouble_out} "no nvcc was found (put it on PATH, or set CUDACXX)" PARENT_SCOPE)
    return()
  endif()
  execute_process(COMMAND "${nvcc}" --version OUTPUT_VARIABLE said ERROR_VARIABLE said RESULT_VARIABLE status)
  if(NOT status EQUAL 0 OR NOT said MATCHES "release ([0-9]+)\\.([0-9]+)")
    set(${trouble_out} "${nvcc} --version fails (${status}):\n${said}" PARENT_SCOPE)
    return()
  endif()
  set(version "${CMAKE_MATCH_1}.${CMAKE_MATCH_2}")
  set(major "${CMAKE_MATCH_1}")
  if(NOT torch_cuda_version MATCHES "^${major}\\.")
    set(${trouble_out} "${nvcc} is of CUDA ${version}, and the installed torch ${torch_version} is built for CUDA \
${torch_cuda_version}: their major versions have to agree (set CUDACXX to the nvcc of such a toolkit, or install a torch \
for CUDA ${major})" PARENT_SCOPE)
    return()
  endif()
  set(probe "${CMAKE_BINARY_DIR}/probe.cu")
  file(WRITE "${probe}" "__global__ void probe() {}\nint main() { probe<<<1, 1>>>(); }\n")
  set(options $ENV{CUDAFLAGS})
  separate_arguments(options)
  if(DEFINED ENV{CUDAHOSTCXX})
    list(APPEND options -ccbin "$ENV{CUDAHOSTCXX}")
  endif()
  execute_process(COMMAND "${nvcc}" ${options} "${probe}" -o "${CMAKE_BINARY_DIR}/probe"
    OUTPUT_VARIABLE said ERROR_VARIABLE said RESULT_VARIABLE status)
  if(NOT status EQUAL 0)
    set(${trouble_out} "${nvcc} cannot compile a kernel that does nothing:\n${said}" PARENT_SCOPE)
    return()
  endif()
  set(${compiler_out} "${nvcc}" PARENT_SCOPE)
endfunction()

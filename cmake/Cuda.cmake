# CUDA as a language, where nvcc is: sets PREFILLD_HAS_CUDA, PREFILLD_CUDNN_INCLUDES (empty without
# cuDNN's headers) and PREFILLD_GENCODE_*, the architectures of a source.
include(CheckLanguage)
if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
  find_program(PREFILLD_NVCC nvcc PATHS /usr/local/cuda/bin)
  if(PREFILLD_NVCC)
    set(ENV{CUDACXX} ${PREFILLD_NVCC})  # check_language tries it
  endif()
endif()
set(CMAKE_CUDA_ARCHITECTURES OFF)  # by source, below
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)  # the program starts on machines without CUDA
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  if(PREFILLD_CUDA STREQUAL "on")
    message(FATAL_ERROR "PREFILLD_CUDA=on, but there is no nvcc that works (CUDACXX names one)")
  endif()
  message(STATUS "CUDA: no nvcc, the backends are cpu only")
  return()
endif()
enable_language(CUDA)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.8)
  if(PREFILLD_CUDA STREQUAL "on")
    message(FATAL_ERROR "CUDA ${CMAKE_CUDA_COMPILER_VERSION} is too old: 12.8 is needed")
  endif()
  message(STATUS "CUDA: ${CMAKE_CUDA_COMPILER_VERSION} is too old, the backends are cpu only")
  return()
endif()
if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)  # CMake 3.25 knows nvcc up to C++17
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
  set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION -std=c++20)
endif()
find_package(CUDAToolkit REQUIRED)
set(PREFILLD_HAS_CUDA ON)
if(CCACHE)
  set(CMAKE_CUDA_COMPILER_LAUNCHER ${CCACHE})
endif()

# sm_90a code runs on 9.0 alone, and it alone has wgmma: kernels with two ways take the other one
# elsewhere. 8.6 and 8.9 run what is compiled for 8.0, later chips PTX.
set(PREFILLD_GENCODE_SM90A -gencode=arch=compute_90a,code=sm_90a)
set(PREFILLD_GENCODE_ALL
    -gencode=arch=compute_80,code=sm_80 -gencode=arch=compute_90a,code=sm_90a
    -gencode=arch=compute_90,code=compute_90)

# cuDNN is loaded at run time; its headers and cudnn-frontend's are needed to build with it.
set(PREFILLD_CUDNN_INCLUDES "")
find_path(CUDNN_INCLUDE cudnn.h HINTS ${CUDAToolkit_INCLUDE_DIRS})
if(CUDNN_INCLUDE)
  set(frontend ${CMAKE_BINARY_DIR}/cudnn-frontend)
  execute_process(COMMAND ${CMAKE_SOURCE_DIR}/deploy/fetch-cudnn-frontend.sh ${frontend}
                  RESULT_VARIABLE failed ERROR_VARIABLE why OUTPUT_QUIET)
  if(failed)
    message(WARNING "CUDA: dense runs without cuDNN, cudnn-frontend could not be fetched: ${why}")
  else()
    set(PREFILLD_CUDNN_INCLUDES ${frontend}/include ${CUDNN_INCLUDE})
  endif()
else()
  message(STATUS "CUDA: no cudnn.h, dense runs without cuDNN")
endif()

# cuBLASLt is loaded at run time too; its header is needed to build what serves models.
find_path(PREFILLD_CUBLASLT_INCLUDE cublasLt.h HINTS ${CUDAToolkit_INCLUDE_DIRS})
if(NOT PREFILLD_CUBLASLT_INCLUDE)
  message(STATUS "CUDA: no cublasLt.h, no models on a GPU")
endif()
message(STATUS "CUDA: ${CMAKE_CUDA_COMPILER_VERSION}, kernels for sm_80 and sm_90a, PTX for later")

#include "kernels/cuda/model/cublas_lt.h"

#include <dlfcn.h>

#define PREFILLD_STRING(x) #x
#define PREFILLD_LIBRARY(major) "libcublasLt.so." PREFILLD_STRING(major)

namespace prefilld::cuda {
namespace {

constexpr char kLibrary[] = PREFILLD_LIBRARY(CUBLAS_VER_MAJOR);  // whose header this is built with

bool Load(CublasLt* lt, std::string* error) {
  void* library = dlopen(kLibrary, RTLD_NOW);
  if (library == nullptr) {
    *error = dlerror();
    return false;
  }
  const auto find = [&](const char* name, auto* function) {
    *function = reinterpret_cast<std::remove_pointer_t<decltype(function)>>(dlsym(library, name));
    if (*function == nullptr) *error = std::string(kLibrary) + " has no " + name;
  };
  error->clear();
  find("cublasLtCreate", &lt->Create);
  find("cublasLtDestroy", &lt->Destroy);
  find("cublasLtMatmul", &lt->Matmul);
  find("cublasLtMatmulAlgoGetHeuristic", &lt->MatmulAlgoGetHeuristic);
  find("cublasLtMatmulDescCreate", &lt->MatmulDescCreate);
  find("cublasLtMatmulDescDestroy", &lt->MatmulDescDestroy);
  find("cublasLtMatmulDescSetAttribute", &lt->MatmulDescSetAttribute);
  find("cublasLtMatrixLayoutCreate", &lt->MatrixLayoutCreate);
  find("cublasLtMatrixLayoutDestroy", &lt->MatrixLayoutDestroy);
  find("cublasLtMatmulPreferenceCreate", &lt->MatmulPreferenceCreate);
  find("cublasLtMatmulPreferenceDestroy", &lt->MatmulPreferenceDestroy);
  find("cublasLtMatmulPreferenceSetAttribute", &lt->MatmulPreferenceSetAttribute);
  return error->empty();
}

}  // namespace

const CublasLt* CublasLt::Open(std::string* error) {
  static CublasLt lt;
  static std::string why;
  static const bool loaded = Load(&lt, &why);
  *error = why;
  return loaded ? &lt : nullptr;
}

}  // namespace prefilld::cuda

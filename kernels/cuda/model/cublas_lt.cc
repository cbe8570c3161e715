#include "kernels/cuda/model/cublas_lt.h"

#include <dlfcn.h>

#include <type_traits>

#include "absl/strings/str_cat.h"

#define PREFILLD_STRING(x) #x
#define PREFILLD_LIBRARY(major) "libcublasLt.so." PREFILLD_STRING(major)

namespace prefilld::cuda {
namespace {

constexpr char kLibrary[] = PREFILLD_LIBRARY(CUBLAS_VER_MAJOR);  // whose header this is built with

absl::Status Load(CublasLt* lt) {
  void* library = dlopen(kLibrary, RTLD_NOW);
  if (library == nullptr) return absl::UnavailableError(dlerror());
  absl::Status status;
  const auto find = [&](const char* name, auto* function) {
    *function = reinterpret_cast<std::remove_pointer_t<decltype(function)>>(dlsym(library, name));
    if (*function == nullptr) {
      status = absl::UnavailableError(absl::StrCat(kLibrary, " has no ", name));
    }
  };
  find("cublasLtCreate", &lt->Create);
  find("cublasLtDestroy", &lt->Destroy);
  find("cublasLtMatmul", &lt->Matmul);
  find("cublasLtGetVersion", &lt->GetVersion);
  find("cublasLtMatmulAlgoCheck", &lt->MatmulAlgoCheck);
  find("cublasLtMatmulAlgoGetHeuristic", &lt->MatmulAlgoGetHeuristic);
  find("cublasLtMatmulDescCreate", &lt->MatmulDescCreate);
  find("cublasLtMatmulDescDestroy", &lt->MatmulDescDestroy);
  find("cublasLtMatmulDescSetAttribute", &lt->MatmulDescSetAttribute);
  find("cublasLtMatrixLayoutCreate", &lt->MatrixLayoutCreate);
  find("cublasLtMatrixLayoutDestroy", &lt->MatrixLayoutDestroy);
  find("cublasLtMatmulPreferenceCreate", &lt->MatmulPreferenceCreate);
  find("cublasLtMatmulPreferenceDestroy", &lt->MatmulPreferenceDestroy);
  find("cublasLtMatmulPreferenceSetAttribute", &lt->MatmulPreferenceSetAttribute);
  return status;
}

}  // namespace

absl::StatusOr<const CublasLt*> CublasLt::Open() {
  static CublasLt lt;
  static const absl::Status loaded = Load(&lt);
  if (!loaded.ok()) return loaded;
  return &lt;
}

}  // namespace prefilld::cuda

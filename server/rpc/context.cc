#include "server/rpc/context.h"

#include "absl/strings/str_cat.h"
#include "server/record/errors.h"

namespace prefilld {

absl::StatusOr<Transformer*> FindModel(const Models& models, const std::string& name,
                                       const char* field) {
  constexpr size_t kNameBytesMax = 128;
  if (name.empty() || name.size() > kNameBytesMax) {
    return InvalidField(field, absl::StrCat(name.size(), " bytes, not from 1 to ", kNameBytesMax));
  }
  const auto model = models.find(name);
  if (model == models.end()) return ResourceNotFound("model", name);
  return model->second.get();
}

}  // namespace prefilld

#include "server/rpc/prefill_registry.h"

#include "absl/strings/str_cat.h"
#include "server/record/errors.h"

namespace prefilld {

absl::StatusOr<std::shared_ptr<PrefillStream>> PrefillRegistry::FindOrStart(
    const Caller& caller, const std::string& request_id, const std::string& content,
    const std::shared_ptr<PrefillStream::Reader>& reader, const Start& start) {
  const Key key = KeyOf(caller, request_id);
  absl::MutexLock lock(&mutex_);
  const auto found = streams_.find(key);
  if (found != streams_.end()) {
    if (found->second->content() != content) {
      return InvalidField(
          "request_id",
          absl::StrCat("'", request_id, "' lives and was asked for with other content"));
    }
    if (found->second->Attach(reader)) return found->second;
    if (found->second->generation() > 0) {  // its lease is about to end
      return RetryLater(absl::StatusCode::kUnavailable, "ending",
                        absl::StrCat("'", request_id, "' is just being given up"),
                        absl::Milliseconds(100));
    }
  }
  auto stream = start();
  if (stream.ok()) streams_.insert_or_assign(key, *stream);
  return stream;
}

void PrefillRegistry::Forget(const PrefillStream& stream) {
  std::shared_ptr<PrefillStream> gone;  // dropped after the lock
  absl::MutexLock lock(&mutex_);
  const auto found = streams_.find(KeyOf(stream.caller(), stream.request_id()));
  if (found == streams_.end() || found->second.get() != &stream) return;
  gone = std::move(found->second);
  streams_.erase(found);
}

void PrefillRegistry::Remove(const Caller& caller, const std::string& request_id,
                             uint64_t generation) {
  std::shared_ptr<PrefillStream> gone;  // dropped after the lock
  absl::MutexLock lock(&mutex_);
  const auto found = streams_.find(KeyOf(caller, request_id));
  if (found == streams_.end() || found->second->generation() != generation) return;
  gone = std::move(found->second);
  streams_.erase(found);
}

}  // namespace prefilld

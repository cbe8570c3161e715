#include "server/engine/fit.h"

#include <algorithm>
#include <string>

#include "absl/strings/str_cat.h"
#include "server/record/errors.h"

namespace prefilld {
namespace {

// Of this job, if it had so many tokens; an Attend is what it is.
HeldBytes Needs(Backend& backend, const Job& job, int64_t tokens) {
  return job.attend ? HeldBy(backend, job.attend->shape, job.policy)
                    : HeldBy(backend, *job.prefill->model, {tokens}, job.policy);
}

// Of the device's memory.
uint64_t Beyond(const HeldBytes& needs, const HeldBytes& held) {
  uint64_t more = 0;
  for (size_t i = 0; i < kHeldCount; ++i) {
    if (!OnHost(static_cast<Holding>(i))) more += needs[i] - std::min(needs[i], held[i]);
  }
  return more;
}

bool Fits(const HeldBytes& needs, const Reserved& reserved) {
  return Of(needs, Holding::kBatch) <= Of(reserved.held, Holding::kBatch) &&
         Beyond(needs, reserved.held) <= reserved.spare;
}

}  // namespace

Reserved ReservedBy(const MemoryPlan& plan) {
  Reserved reserved{.held = plan.held, .spare = plan.spare};
  Of(reserved.held, Holding::kBatch) = plan.batches;
  return reserved;
}

absl::Status CheckFits(Backend& backend, const Reserved& reserved, const Job& job) {
  const HeldBytes needs = Needs(backend, job, job.tokens());
  if (Fits(needs, reserved)) return absl::OkStatus();
  const std::string why = absl::StrCat(
      job.tokens(), " tokens in blocks of ", job.policy.block_size, " need ", Beyond(needs, {}),
      " bytes of the device's memory, ", Beyond(needs, reserved.held), " more than is reserved; ",
      reserved.spare, " are spare");
  if (job.attend) return InvalidField("tensors", why);
  int64_t most = 0;  // and what lies beyond `over` does not fit
  for (int64_t over = job.tokens(); over - most > 1;) {
    const int64_t middle = most + (over - most) / 2;
    (Fits(Needs(backend, job, middle), reserved) ? most : over) = middle;
  }
  return InvalidField("token_ids", absl::StrCat(why, ": at most ", most, " fit"));
}

}  // namespace prefilld

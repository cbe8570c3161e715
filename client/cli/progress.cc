#include "client/cli/progress.h"

#include <algorithm>

#include "absl/strings/str_format.h"

namespace prefilld::cli {

Progress::~Progress() {
  absl::MutexLock lock(&mutex_);
  if (drawn_) stream_ << "\r\033[K" << std::flush;
}

void Progress::Update(absl::string_view what, double done, double total) {
  constexpr int kWidth = 40;
  absl::MutexLock lock(&mutex_);
  const absl::Time now = client::SteadyNow();
  if (!terminal_ || now < next_draw_) return;
  next_draw_ = now + absl::Milliseconds(100);
  drawn_ = true;
  const double fraction = total > 0 ? std::clamp(done / total, 0.0, 1.0) : 0.0;
  const int filled = static_cast<int>(fraction * kWidth);
  stream_ << absl::StrFormat("\r%-12s [%s%s] %3.0f%%\033[K", what, std::string(filled, '#'),
                             std::string(kWidth - filled, '.'), 100 * fraction)
          << std::flush;
}

}  // namespace prefilld::cli

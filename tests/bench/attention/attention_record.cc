#include "tests/bench/attention/attention_record.h"

#include <cmath>
#include <cstdio>

namespace prefilld::bench {
namespace {

using nlohmann::json;

constexpr double kKernelError = 1e-2;  // above it a kernel is wrong

json ToJson(const Record& r) {
  const auto number = [](double x) { return std::isnan(x) ? json(nullptr) : json(x); };
  return {{"workload", r.workload},
          {"method", r.method},
          {"kernels", r.kernels},
          {"tokens", r.tokens},
          {"sequences", r.sequences},
          {"ms", number(r.ms.median)},
          {"ms_min", number(r.ms.least)},
          {"ms_max", number(r.ms.most)},
          {"tflops", number(r.tflops)},
          {"percent_of_cudnn", number(r.percent_of_cudnn)},
          {"select_us", number(r.select_us)},
          {"mass_us", number(r.mass_us)},
          {"density", number(r.density)},
          {"error", number(r.error)},
          {"kernel_error", number(r.kernel_error)},
          {"captured", number(r.captured)},
          {"captured_worst_head", number(r.captured_head)},
          {"captured_worst_row", number(r.captured_row)},
          {"pipeline_ms", number(r.pipeline_ms)},
          {"pipeline_with_mass_ms", number(r.pipeline_mass_ms)},
          {"bound_ms", number(r.bound_ms)}};
}

}  // namespace

void Table::Header() const {
  std::printf("%-16s %8s %-11s %-5s %23s %7s %6s %7s %7s %7s %8s %8s %17s %8s %8s %8s\n",
              "workload", "tokens", "method", "set", "ms (min..max)", "TFLOP/s", "%cudnn", "select",
              "mass us", "density", "err", "kernel", "captured", "pipeline", "+mass", "bound");
}

void Table::Add(const Record& r) {
  const auto cell = [](double x, const char* format) {
    char text[32];
    std::snprintf(text, sizeof(text), format, x);
    return std::string(std::isnan(x) ? "-" : text);
  };
  const std::string ms = cell(r.ms.median, "%.3f") + " (" + cell(r.ms.least, "%.3f") + ".." +
                         cell(r.ms.most, "%.3f") + ")";
  const std::string tokens =
      (r.sequences > 1 ? std::to_string(r.sequences) + "x" : "") + std::to_string(r.tokens);
  const std::string captured = std::isnan(r.captured) ? "-"
                                                      : cell(r.captured, "%.3f") + "/" +
                                                            cell(r.captured_head, "%.3f") + "/" +
                                                            cell(r.captured_row, "%.3f");
  std::printf("%-16s %8s %-11s %-5s %23s %7s %6s %7s %7s %7s %8s %8s %17s %8s %8s %8s\n",
              r.workload.c_str(), tokens.c_str(), r.method.c_str(), r.kernels.c_str(), ms.c_str(),
              cell(r.tflops, "%.1f").c_str(), cell(r.percent_of_cudnn, "%.1f").c_str(),
              cell(r.select_us, "%.1f").c_str(), cell(r.mass_us, "%.1f").c_str(),
              cell(r.density, "%.4f").c_str(), cell(r.error, "%.2e").c_str(),
              cell(r.kernel_error, "%.2e").c_str(), captured.c_str(),
              cell(r.pipeline_ms, "%.3f").c_str(), cell(r.pipeline_mass_ms, "%.3f").c_str(),
              cell(r.bound_ms, "%.3f").c_str());
  std::fflush(stdout);
  if (r.kernel_error > kKernelError) wrong_ = true;
  records_.push_back(ToJson(r));
}

}  // namespace prefilld::bench

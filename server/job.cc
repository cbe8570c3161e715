#include "server/job.h"

namespace prefilld {

double JobReport::MeanDensity() const {
  double sum = 0;
  for (const HeadReport& entry : entries) sum += entry.density;
  return entries.empty() ? 0 : sum / static_cast<double>(entries.size());
}

double JobReport::MeanCapturedMass() const {
  double sum = 0;
  if (!captured_mass_measured || entries.empty()) return 0;
  for (const HeadReport& entry : entries) sum += entry.captured_mass;
  return sum / static_cast<double>(entries.size());
}

}  // namespace prefilld

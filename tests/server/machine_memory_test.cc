#include "server/machine_memory.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <limits>
#include <string>

#include "tests/client/temp_dir.h"

namespace prefilld {
namespace {

constexpr uint64_t kUnlimited = std::numeric_limits<uint64_t>::max();

class ControlGroupTest : public testing::Test {
 protected:
  void Write(const std::string& path, const std::string& text) const {
    const std::filesystem::path file = root() + path;
    std::filesystem::create_directories(file.parent_path());
    std::ofstream(file) << text << "\n";
  }
  std::string root() const { return directory_ / ""; }
  uint64_t Limit() const { return ControlGroupMemory(root()); }

 private:
  TempDir directory_;
};

TEST_F(ControlGroupTest, WithoutOneThereIsNoLimit) {
  EXPECT_EQ(Limit(), kUnlimited);
  Write("/proc/self/cgroup", "0::/");
  EXPECT_EQ(Limit(), kUnlimited);
  Write("/sys/fs/cgroup/memory.max", "max");
  EXPECT_EQ(Limit(), kUnlimited);
}

TEST_F(ControlGroupTest, TheLeastOfAGroupAndThoseAboveItCounts) {
  Write("/proc/self/cgroup", "0::/a/b");
  Write("/sys/fs/cgroup/a/b/memory.max", "3000000");
  EXPECT_EQ(Limit(), 3'000'000u);
  Write("/sys/fs/cgroup/a/memory.max", "2000000");
  EXPECT_EQ(Limit(), 2'000'000u);
  Write("/sys/fs/cgroup/a/b/memory.max", "1000000");
  EXPECT_EQ(Limit(), 1'000'000u);
}

TEST_F(ControlGroupTest, AContainersOwnIsAtTheTop) {
  Write("/proc/self/cgroup", "0::/docker/0123");
  Write("/sys/fs/cgroup/memory.max", "5000000");
  EXPECT_EQ(Limit(), 5'000'000u);
}

TEST_F(ControlGroupTest, TheFirstVersionHasAnotherPlace) {
  Write("/proc/self/cgroup", "5:cpu,cpuacct:/x\n4:hugetlb,memory:/a:b\nnonsense");
  Write("/sys/fs/cgroup/memory/a:b/memory.limit_in_bytes", "7000000");
  Write("/sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712");
  EXPECT_EQ(Limit(), 7'000'000u);
}

TEST(MachineMemory, IsSomethingLikeAMachines) {
  EXPECT_GT(MachineMemory(), uint64_t{64} << 20);
  EXPECT_LT(MachineMemory(), uint64_t{1} << 50);
}

}  // namespace
}  // namespace prefilld

#include "kernels/cuda/model/algorithms.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>

namespace prefilld::cuda {
namespace {

class AlgorithmsTest : public testing::Test {
 protected:
  AlgorithmsTest() { std::filesystem::create_directories(directory_); }
  ~AlgorithmsTest() override { std::filesystem::remove_all(directory_); }

  Algorithms Open(const char* device = "A GPU (80 GB)", size_t version = 130000) const {
    return Algorithms(directory_, device, version);
  }
  std::filesystem::path File() const {
    return std::filesystem::directory_iterator(directory_)->path();
  }

  static cublasLtMatmulAlgo_t Algorithm(char fill) {
    cublasLtMatmulAlgo_t algorithm;
    std::memset(&algorithm, fill, sizeof algorithm);
    return algorithm;
  }
  static bool Equal(const cublasLtMatmulAlgo_t* found, char fill) {
    const cublasLtMatmulAlgo_t wanted = Algorithm(fill);
    return found != nullptr && std::memcmp(found, &wanted, sizeof wanted) == 0;
  }

  const std::string directory_ = testing::TempDir() + "algorithms";
  const ProductShape shape_ = {DType::kBF16, DType::kF32, 4096, 1024, 64, true, false};
};

TEST_F(AlgorithmsTest, WhatIsKeptIsThereAtTheNextStart) {
  ProductShape other = shape_;
  other.bias = true;
  {
    Algorithms algorithms = Open();
    EXPECT_EQ(algorithms.Find(shape_), nullptr);
    algorithms.Keep(shape_, Algorithm(0x1F));
    algorithms.Keep(other, Algorithm(-1));
  }
  EXPECT_TRUE(Equal(Open().Find(shape_), 0x1F));
  EXPECT_TRUE(Equal(Open().Find(other), -1));
  for (const auto& entry : std::filesystem::directory_iterator(directory_)) {
    EXPECT_EQ(entry.path().extension(), ".txt") << "nothing half written is left";
  }
}

TEST_F(AlgorithmsTest, AnotherDeviceOrLibraryHasItsOwn) {
  Open().Keep(shape_, Algorithm(1));
  EXPECT_EQ(Open("Another GPU").Find(shape_), nullptr);
  EXPECT_EQ(Open("A GPU (80 GB)", 130100).Find(shape_), nullptr);
  EXPECT_TRUE(Equal(Open().Find(shape_), 1));
}

TEST_F(AlgorithmsTest, ABrokenFileCostsOnlyItsBrokenLines) {
  Open().Keep(shape_, Algorithm(1));
  const std::string bytes(2 * sizeof(cublasLtMatmulAlgo_t), 'a');
  const std::string no_digits(bytes.size(), 'z');
  std::ofstream(File(), std::ios::app) << "BF16 F32 1 2\n"
                                       << "\n"
                                       << "BF16 F32 1 2 3 0 0 aa\n"
                                       << "BF16 F32 1 2 4 0 0 " << no_digits << "\n"
                                       << "BF16 F64 1 2 5 0 0 " << bytes << "\n"
                                       << "BF16 F32 1 2 x 0 0 " << bytes << "\n"
                                       << "BF16 F32 1 2 6 0 0 " << bytes << "\n";
  const Algorithms algorithms = Open();
  EXPECT_TRUE(Equal(algorithms.Find(shape_), 1));
  for (const int64_t tokens : {0, 3, 4, 5}) {
    for (const DType rows : {DType::kF32, DType::kBF16, DType::kF16}) {
      EXPECT_EQ(algorithms.Find({DType::kBF16, rows, 1, 2, tokens, false, false}), nullptr);
    }
  }
  EXPECT_TRUE(Equal(algorithms.Find({DType::kBF16, DType::kF32, 1, 2, 6, false, false}), '\xAA'));
}

// Each process of a container may be number 1: what another one has half written is not ours.
TEST_F(AlgorithmsTest, WhatOthersWriteBesideItStays) {
  Open().Keep(shape_, Algorithm(1));
  const std::string other = File().string() + "." + std::to_string(getpid());
  std::ofstream(other) << "half a li";
  ProductShape more = shape_;
  more.bias = true;
  Open().Keep(more, Algorithm(2));
  std::ifstream file(other);
  std::string text;
  std::getline(file, text);
  EXPECT_EQ(text, "half a li");
  EXPECT_TRUE(Equal(Open().Find(shape_), 1));
  EXPECT_TRUE(Equal(Open().Find(more), 2));
}

TEST_F(AlgorithmsTest, WithoutADirectoryNothingIsKept) {
  Algorithms algorithms("", "A GPU", 1);
  algorithms.Keep(shape_, Algorithm(1));
  EXPECT_TRUE(Equal(algorithms.Find(shape_), 1));
  Algorithms nowhere("/nonexistent", "A GPU", 1);
  nowhere.Keep(shape_, Algorithm(1));
  EXPECT_TRUE(Equal(nowhere.Find(shape_), 1));
}

TEST(TokensStep, IsTheNextOfFew) {
  EXPECT_EQ(TokensStep(1), 16);
  EXPECT_EQ(TokensStep(16), 16);
  EXPECT_EQ(TokensStep(17), 24);
  EXPECT_EQ(TokensStep(25), 32);
  EXPECT_EQ(TokensStep(2049), 3072);
  EXPECT_EQ(TokensStep(3073), 4096);
}

}  // namespace
}  // namespace prefilld::cuda

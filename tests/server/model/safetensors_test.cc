#include "server/model/safetensors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <cstring>
#include <filesystem>
#include <string>

#include "tests/server/model/model_directory.h"

namespace prefilld {
namespace {

using testing::AllOf;
using testing::HasSubstr;

// A file with this header, padded as writers do, and this many bytes of data.
std::string File(std::string header, size_t data_bytes) {
  header.resize((header.size() + 7) / 8 * 8, ' ');
  const uint64_t length = header.size();
  std::string file(sizeof(length), '\0');
  std::memcpy(file.data(), &length, sizeof(length));
  file += header;
  for (size_t i = 0; i < data_bytes; ++i) file += static_cast<char>(i);
  return file;
}

std::string Tensor(const std::string& name, const std::string& dtype, const std::string& shape,
                   const std::string& offsets) {
  return "\"" + name + "\": {\"dtype\": \"" + dtype + "\", \"shape\": " + shape +
         ", \"data_offsets\": " + offsets + "}";
}

std::string ErrorOf(const std::string& file) {
  const ModelDirectory directory;
  directory.Write("model.safetensors", file);
  const auto opened = SafeTensors::Open(directory.path());
  EXPECT_TRUE(opened.ok() || absl::IsInvalidArgument(opened.status())) << opened.status();
  const std::string message(opened.status().message());
  if (!opened.ok()) {
    EXPECT_THAT(message, testing::StartsWith(directory.path() + "/model.safetensors: "));
  }
  return message;
}

TEST(SafeTensors, TensorsPointIntoTheFile) {
  const ModelDirectory directory;
  directory.Write("model.safetensors", File("{\"__metadata__\": {\"format\": \"pt\"}, " +
                                                Tensor("a", "F32", "[2, 2]", "[4, 20]") + ", " +
                                                Tensor("b", "BF16", "[2]", "[0, 4]") + ", " +
                                                Tensor("scalar", "U8", "[]", "[20, 21]") + ", " +
                                                Tensor("none", "F32", "[0, 3]", "[4, 4]") + "}",
                                            21));
  const auto file = SafeTensors::Open(directory.path());
  ASSERT_TRUE(file.ok()) << file.status();
  ASSERT_EQ(file->tensors().size(), 4u);
  const SafeTensor& a = file->tensors().find("a")->second;
  EXPECT_EQ(a.dtype, "F32");
  EXPECT_EQ(a.shape, (std::vector<int64_t>{2, 2}));
  EXPECT_EQ(a.bytes, 16u);
  EXPECT_EQ(static_cast<int>(a.data[15]), 19);
  EXPECT_EQ(static_cast<int>(file->tensors().find("b")->second.data[0]), 0);
  EXPECT_EQ(static_cast<int>(file->tensors().find("scalar")->second.data[0]), 20);
}

TEST(SafeTensors, TruncatedFilesAreRefused) {
  const std::string good = File("{" + Tensor("a", "F32", "[4]", "[0, 16]") + "}", 16);
  EXPECT_EQ(ErrorOf(good), "");
  for (size_t bytes = 0; bytes < good.size(); ++bytes) {
    EXPECT_NE(ErrorOf(good.substr(0, bytes)), "") << bytes << " bytes";
  }
  EXPECT_THAT(ErrorOf(good.substr(0, good.size() - 1)),
              HasSubstr("tensor 'a' spans bytes [0, 16) of 15; the file may be truncated"));
}

TEST(SafeTensors, AFileThatChangesIsTold) {
  const std::string file = File("{" + Tensor("a", "U8", "[3]", "[0, 3]") + "}", 3);
  for (const std::string how : {"written to", "truncated", "replaced"}) {
    const ModelDirectory directory;
    directory.Write("model.safetensors", file);
    const auto opened = SafeTensors::Open(directory.path());
    ASSERT_TRUE(opened.ok()) << opened.status();
    EXPECT_TRUE(opened->CheckFiles().ok());
    const std::filesystem::path path = directory / "model.safetensors";
    const auto before = std::filesystem::last_write_time(path);
    if (how == "replaced") {
      directory.Write("other", file);
      std::filesystem::rename(directory / "other", path);
      EXPECT_TRUE(opened->CheckFiles().ok());
      continue;
    }
    if (how == "truncated") {
      std::filesystem::resize_file(path, 1);
    } else {
      directory.Write("model.safetensors", file);
      std::filesystem::last_write_time(path, before + std::chrono::seconds(1));
    }
    EXPECT_EQ(opened->CheckFiles().code(), absl::StatusCode::kUnavailable) << how;
    std::filesystem::resize_file(path, file.size());
    std::filesystem::last_write_time(path, before);
    EXPECT_FALSE(opened->CheckFiles().ok()) << "it is for good";
  }
}

TEST(SafeTensors, CorruptHeadersAreRefused) {
  EXPECT_THAT(ErrorOf(File("{\"a\": ", 0)), HasSubstr("not a JSON object"));
  EXPECT_THAT(ErrorOf(File("[1, 2]", 0)), HasSubstr("not a JSON object"));
  EXPECT_THAT(ErrorOf(File(std::string(1 << 20, '['), 0)), HasSubstr("not a JSON object"));
  std::string huge = File("{}", 0);
  huge[7] = '\x7f';  // a length near 2^63
  EXPECT_THAT(ErrorOf(huge), HasSubstr("at most 100000000 are read"));
  EXPECT_THAT(ErrorOf(File("{\"a\": 3}", 0)), HasSubstr("tensor 'a' lacks"));
  EXPECT_THAT(ErrorOf(File("{\"a\": {\"dtype\": \"F32\", \"shape\": [1]}}", 0)),
              HasSubstr("tensor 'a' lacks"));
  EXPECT_THAT(ErrorOf(File("{" + Tensor("a", "F32", "[1]", "[0, 4, 8]") + "}", 8)),
              HasSubstr("tensor 'a' lacks"));
}

TEST(SafeTensors, TensorsThatDoNotFitTheirBytesAreRefused) {
  const auto with = [](const std::string& dtype, const std::string& shape,
                       const std::string& offsets) {
    return ErrorOf(File("{" + Tensor("x\\ny", dtype, shape, offsets) + "}", 16));
  };
  EXPECT_EQ(with("F32", "[4]", "[0, 16]"), "");
  EXPECT_THAT(with("F33", "[4]", "[0, 16]"), HasSubstr("unknown dtype 'F33'"));
  EXPECT_THAT(with("F32", "[3]", "[0, 16]"),
              HasSubstr("tensor 'x\\ny' spans 16 bytes, its shape and dtype need 12"));
  EXPECT_THAT(with("F32", "[4]", "[0, 17]"), HasSubstr("spans bytes [0, 17) of 16"));
  EXPECT_THAT(with("F32", "[4]", "[16, 0]"), HasSubstr("spans bytes [16, 0) of 16"));
  EXPECT_THAT(with("F32", "[4]", "[-16, 0]"), HasSubstr("offsets that are not sizes"));
  EXPECT_THAT(with("F32", "[4]", "[0, 18446744073709551615]"), HasSubstr("not sizes"));
  EXPECT_THAT(with("F32", "[-4]", "[0, 16]"), HasSubstr("a side that is not a size"));
  EXPECT_THAT(with("F32", "[4.0]", "[0, 16]"), HasSubstr("a side that is not a size"));
  EXPECT_THAT(with("F32", "[4611686018427387904]", "[0, 16]"), HasSubstr("overflows"));
  EXPECT_THAT(with("F32", "[4294967296, 4294967296]", "[0, 16]"), HasSubstr("overflows"));
  EXPECT_THAT(with("F32", "[0, 4]", "[0, 16]"), HasSubstr("need 0"));
}

TEST(SafeTensors, OverlapsGapsAndBadAlignmentAreRefused) {
  const auto two = [](const std::string& first, const std::string& second, size_t bytes) {
    return ErrorOf(File(
        "{" + Tensor("a", "F32", "[2]", first) + ", " + Tensor("b", "F32", "[2]", second) + "}",
        bytes));
  };
  EXPECT_EQ(two("[0, 8]", "[8, 16]", 16), "");
  EXPECT_EQ(two("[8, 16]", "[0, 8]", 16), "");
  EXPECT_THAT(two("[0, 8]", "[4, 12]", 12),
              HasSubstr("tensor 'b' starts at byte 4, inside the one before it"));
  EXPECT_THAT(two("[0, 8]", "[0, 8]", 8), HasSubstr("inside the one before it"));
  EXPECT_THAT(two("[0, 8]", "[12, 20]", 20), HasSubstr("after a gap"));
  EXPECT_THAT(two("[0, 8]", "[8, 16]", 20), HasSubstr("its tensors cover 16"));
  EXPECT_THAT(ErrorOf(File("{" + Tensor("a", "U8", "[1]", "[0, 1]") + ", " +
                               Tensor("b", "F32", "[1]", "[1, 5]") + "}",
                           5)),
              HasSubstr("tensor 'b' is not aligned"));
}

class ShardedSafeTensors : public testing::Test {
 protected:
  static constexpr char kIndex[] = "model.safetensors.index.json";

  ShardedSafeTensors() {
    directory_.Write("one.safetensors", File("{" + Tensor("a", "U8", "[1]", "[0, 1]") + "}", 1));
    directory_.Write("two.safetensors", File("{" + Tensor("b", "U8", "[2]", "[0, 2]") + "}", 2));
    WriteIndex(R"("a": "one.safetensors", "b": "two.safetensors")");
  }
  void WriteIndex(const std::string& entries) {
    directory_.Write(kIndex, "{\"metadata\": {}, \"weight_map\": {" + entries + "}}");
  }
  std::string Error() {
    return std::string(SafeTensors::Open(directory_.path()).status().message());
  }

  ModelDirectory directory_;
};

TEST_F(ShardedSafeTensors, HaveTheTensorsOfAllShards) {
  const auto file = SafeTensors::Open(directory_.path());
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_EQ(file->tensors().size(), 2u);
  EXPECT_EQ(file->tensors().find("b")->second.bytes, 2u);
}

TEST_F(ShardedSafeTensors, PathsOutOfTheDirectoryAreRefused) {
  for (const char* shard : {"../two.safetensors", "/etc/passwd", "..", ".", "", "a/b.safetensors",
                            "two.safetensors\\u0000"}) {
    WriteIndex(R"("a": "one.safetensors", "b": ")" + std::string(shard) + "\"");
    EXPECT_THAT(Error(), HasSubstr("which is not a plain file name")) << shard;
  }
  WriteIndex(R"("a": 3)");
  EXPECT_THAT(Error(), HasSubstr("which is not a plain file name"));
}

TEST_F(ShardedSafeTensors, IndexAndShardsMustAgree) {
  WriteIndex(R"("a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors")");
  EXPECT_THAT(Error(), AllOf(HasSubstr("two.safetensors: tensor 'c' is missing")));
  WriteIndex(R"("a": "one.safetensors")");
  EXPECT_EQ(Error(), "");
  WriteIndex(R"("a": "two.safetensors")");
  EXPECT_THAT(Error(), HasSubstr("tensor 'b' is not listed for this file"));
  WriteIndex(R"("a": "three.safetensors")");
  EXPECT_THAT(Error(), HasSubstr("three.safetensors: No such file"));
}

TEST_F(ShardedSafeTensors, BrokenIndexIsRefused) {
  for (const char* text : {"", "{", "[]", "{}", "{\"weight_map\": []}"}) {
    directory_.Write(kIndex, text);
    EXPECT_THAT(Error(), HasSubstr(kIndex)) << text;
  }
}

}  // namespace
}  // namespace prefilld

#include "client/cpp/safetensors.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <cstring>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/client/temp_dir.h"

namespace prefilld::client {
namespace {

std::string File(const std::string& header, const std::string& data) {
  const uint64_t size = header.size();
  return std::string(reinterpret_cast<const char*>(&size), 8) + header + data;
}

v1::TensorSpec Spec(const std::string& name, v1::DataType type, std::vector<int64_t> shape) {
  v1::TensorSpec spec;
  spec.set_name(name);
  spec.set_data_type(type);
  spec.mutable_shape()->Add(shape.begin(), shape.end());
  return spec;
}

TEST(SafetensorsFile, ReadsTensorsInAnyOrderWithMetadata) {
  const TempDir dir;
  const std::string path =
      dir.Write("a", File(R"({"__metadata__":{"format":"pt"},)"
                          R"("b":{"dtype":"I32","shape":[2],"data_offsets":[6,14]},)"
                          R"("a":{"dtype":"BF16","shape":[1,3],"data_offsets":[0,6]}})",
                          std::string("abcdef\1\0\0\0\2\0\0\0", 14)));
  const auto file = SafetensorsFile::Open(path);
  ASSERT_TRUE(file.ok()) << file.status();
  ASSERT_EQ(file->tensors().size(), 2u);
  const InputTensor* a = file->Find("a");
  ASSERT_NE(a, nullptr);
  EXPECT_EQ(Describe(a->spec), "a [1, 3] BF16");
  EXPECT_EQ(std::memcmp(a->data, "abcdef", 6), 0);
  int32_t values[2];
  std::memcpy(values, file->Find("b")->data, 8);  // not aligned
  EXPECT_EQ(values[0], 1);
  EXPECT_EQ(values[1], 2);
  EXPECT_EQ(file->Find("c"), nullptr);
}

TEST(SafetensorsFile, DoesNotListWhatTheServiceCannotCarry) {
  const TempDir dir;
  const auto file = SafetensorsFile::Open(
      dir.Write("a", File(R"({"x":{"dtype":"I64","shape":[1],"data_offsets":[0,8]},)"
                          R"("scalar":{"dtype":"U8","shape":[],"data_offsets":[8,9]},)"
                          R"("u":{"dtype":"U8","shape":[1],"data_offsets":[9,10]}})",
                          std::string(10, 'x'))));
  ASSERT_TRUE(file.ok()) << file.status();
  ASSERT_EQ(file->tensors().size(), 1u);
  EXPECT_EQ(file->tensors()[0].spec.name(), "u");
  EXPECT_EQ(file->Get("u")->spec.name(), "u");
  EXPECT_NE(file->Get("x").status().message().find("is I64 [1]"), std::string::npos);
  EXPECT_NE(file->Get("y").status().message().find("no tensor y"), std::string::npos);
}

TEST(SafetensorsFile, KeepsTheMapForItsTensors) {
  const TempDir dir;
  InputTensor tensor;
  {
    const auto file = SafetensorsFile::Open(
        dir.Write("a", File(R"({"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}})", "xyz")));
    ASSERT_TRUE(file.ok());
    tensor = file->tensors()[0];
  }
  EXPECT_EQ(std::memcmp(tensor.data, "xyz", 3), 0);
}

TEST(SafetensorsFile, RefusesBrokenFiles) {
  const TempDir dir;
  const auto entry = [](const std::string& dtype, const std::string& shape,
                        const std::string& offsets) {
    return File(absl::StrCat(R"({"a":{"dtype":)", dtype, R"(,"shape":)", shape,
                             R"(,"data_offsets":)", offsets, "}}"),
                "12345678");
  };
  const std::string u8 = R"("U8")";
  const std::pair<const char*, std::string> cases[] = {
      {"empty", ""},
      {"too short", "1234567"},
      {"a header longer than the file", File("{}", "").replace(0, 1, "\x03")},
      {"a header of 2^64 - 1 bytes", std::string(8, '\xff') + "{}"},
      {"no JSON", File("{\"a\":", "")},
      {"no UTF-8", File("{\"\xff\":1}", "")},
      {"no object", File("[]", "")},
      {"deep nesting", File(std::string(100000, '['), "")},
      {"an entry that is no object", File(R"({"a":1})", "")},
      {"no dtype", File(R"({"a":{"shape":[1],"data_offsets":[0,1]}})", "1")},
      {"a dtype that is no string", entry("1", "[8]", "[0,8]")},
      {"a shape that is no list", entry(u8, "8", "[0,8]")},
      {"a negative dimension", entry(u8, "[-8]", "[0,8]")},
      {"a fractional dimension", entry(u8, "[8.0]", "[0,8]")},
      {"a dimension of 2^63", entry(u8, "[9223372036854775808]", "[0,8]")},
      {"one offset", entry(u8, "[8]", "[8]")},
      {"a range backwards", entry(u8, "[8]", "[8,0]")},
      {"a range over the end", entry(u8, "[9]", "[0,9]")},
      {"a range that is not the size", entry(u8, "[7]", "[0,8]")},
      {"overlapping tensors", File(R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},)"
                                   R"("b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}})",
                                   "123")},
      {"two tensors of one name", File(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
                                       R"("a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}})",
                                       "12")},
  };
  for (const auto& [what, bytes] : cases) {
    EXPECT_EQ(SafetensorsFile::Open(dir.Write("a", bytes)).status().code(),
              absl::StatusCode::kInvalidArgument)
        << what;
  }
  EXPECT_EQ(SafetensorsFile::Open(dir / "none").status().code(), absl::StatusCode::kNotFound);
  EXPECT_FALSE(SafetensorsFile::Open(dir / ".").ok());
}

TEST(SafetensorsFile, SurvivesListsThatLieDeepInEachOther) {
  const TempDir dir;
  const size_t depth = 500'000;  // a stack that goes as deep ends far before
  const std::string shape = std::string(depth, '[') + std::string(depth, ']');
  const auto file = SafetensorsFile::Open(dir.Write(
      "a",
      File(absl::StrCat(R"({"a":{"dtype":"F32","shape":)", shape, R"(,"data_offsets":[0,4]}})"),
           "abcd")));
  EXPECT_EQ(file.status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(SafetensorsFile, SurvivesDamagedBytes) {
  const TempDir dir;
  const std::string good = File(R"({"a":{"dtype":"U8","shape":[2,2],"data_offsets":[0,4]},)"
                                R"("b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})",
                                "12345678");
  std::mt19937 rng(1);
  for (int i = 0; i < 200; ++i) {
    std::string bytes = good.substr(0, rng() % 4 == 0 ? rng() % good.size() : good.size());
    for (int flips = 0; flips < 3 && !bytes.empty(); ++flips) {
      bytes[rng() % bytes.size()] = static_cast<char>(rng());
    }
    const auto file = SafetensorsFile::Open(dir.Write("a", bytes));
    if (!file.ok()) continue;
    unsigned sum = 0;  // reads every byte it claims to have
    for (const InputTensor& tensor : file->tensors()) {
      const auto* data = static_cast<const uint8_t*>(tensor.data);
      for (uint64_t j = 0; j < *TensorBytes(tensor.spec); ++j) sum += data[j];
    }
    EXPECT_LT(sum, 8u * 256);
  }
}

TEST(SafetensorsWriter, WritesWhatTheReaderReads) {
  const TempDir dir;
  {
    auto writer = SafetensorsWriter::Create(dir / "out");
    ASSERT_TRUE(writer.ok()) << writer.status();
    // Allocated twice, as by a call that is tried again: the second counts.
    ASSERT_TRUE((*writer)->Allocate({Spec("x", v1::DATA_TYPE_U8, {100000})}).ok());
    const auto places = (*writer)->Allocate(
        {Spec("b", v1::DATA_TYPE_F32, {1, 2}), Spec("a", v1::DATA_TYPE_U8, {3})});
    ASSERT_TRUE(places.ok()) << places.status();
    EXPECT_EQ(reinterpret_cast<uintptr_t>((*places)[0]) % 8, 0u);
    std::memcpy((*places)[0], "12345678", 8);
    std::memcpy((*places)[1], "xyz", 3);
    EXPECT_FALSE(std::filesystem::exists(dir / "out")) << "not before Commit";
    ASSERT_TRUE((*writer)->Commit().ok());
  }
  EXPECT_EQ(dir.Count(), 1);
  struct stat info;
  ASSERT_EQ(stat((dir / "out").c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777, 0644u);
  const auto file = SafetensorsFile::Open(dir / "out");
  ASSERT_TRUE(file.ok()) << file.status();
  ASSERT_EQ(file->tensors().size(), 2u);
  EXPECT_EQ(Describe(file->Find("b")->spec), "b [1, 2] F32");
  EXPECT_EQ(std::memcmp(file->Find("b")->data, "12345678", 8), 0);
  EXPECT_EQ(std::memcmp(file->Find("a")->data, "xyz", 3), 0);
}

TEST(SafetensorsWriter, LeavesTheOldFileAndNothingElseWithoutCommit) {
  const TempDir dir;
  dir.Write("out", "old");
  {
    auto writer = SafetensorsWriter::Create(dir / "out");
    ASSERT_TRUE(writer.ok());
    ASSERT_TRUE((*writer)->Allocate({Spec("a", v1::DATA_TYPE_U8, {3})}).ok());
    EXPECT_EQ(dir.Count(), 2);
  }
  EXPECT_EQ(dir.Count(), 1);
  EXPECT_EQ(dir.Read("out"), "old");
}

TEST(SafetensorsWriter, RefusesBadPathsAndSpecs) {
  const TempDir dir;
  EXPECT_FALSE(SafetensorsWriter::Create(dir / "none/out").ok());
  EXPECT_FALSE(SafetensorsWriter::Create("/dev/null").ok());
  auto writer = SafetensorsWriter::Create(dir / "out");
  ASSERT_TRUE(writer.ok());
  const v1::TensorSpec a = Spec("a", v1::DATA_TYPE_U8, {1});
  EXPECT_FALSE((*writer)->Allocate({a, a}).ok());
  EXPECT_FALSE((*writer)->Allocate({Spec("a", v1::DATA_TYPE_U8, {-1})}).ok());
  const v1::TensorSpec huge = Spec("h", v1::DATA_TYPE_U8, {int64_t{1} << 62});
  EXPECT_FALSE((*writer)->Allocate({a, huge}).ok());
  EXPECT_FALSE((*writer)->Allocate({huge}).ok()) << "no disk has room for it";
  EXPECT_TRUE((*writer)->Allocate({a}).ok());
}

}  // namespace
}  // namespace prefilld::client

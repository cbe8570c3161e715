#include "server/rpc/status.h"

#include <gtest/gtest.h>

#include <string>

#include "google/rpc/error_details.pb.h"
#include "server/record/errors.h"

namespace prefilld {
namespace {

google::rpc::Status Details(const grpc::Status& status) {
  google::rpc::Status details;
  EXPECT_TRUE(details.ParseFromString(status.error_details()));
  EXPECT_EQ(details.code(), status.error_code());
  return details;
}

template <typename Detail>
bool Find(const grpc::Status& status, Detail* found) {
  const google::rpc::Status details = Details(status);
  for (const auto& any : details.details()) {
    if (any.UnpackTo(found)) return true;
  }
  return false;
}

TEST(ToGrpcStatus, OkHasNoDetails) {
  EXPECT_TRUE(ToGrpcStatus(absl::OkStatus()).ok());
  EXPECT_EQ(ToGrpcStatus(absl::OkStatus()).error_details(), "");
}

TEST(ToGrpcStatus, InvalidArgumentNamesTheField) {
  const auto status = ToGrpcStatus(InvalidField("sparsity.gamma", "2 is not below 1"));
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  google::rpc::BadRequest bad;
  ASSERT_TRUE(Find(status, &bad));
  ASSERT_EQ(bad.field_violations_size(), 1);
  EXPECT_EQ(bad.field_violations(0).field(), "sparsity.gamma");
  EXPECT_NE(bad.field_violations(0).description().find("2 is not below 1"), std::string::npos);
}

TEST(ToGrpcStatus, NotFoundNamesTheResource) {
  google::rpc::ResourceInfo resource;
  ASSERT_TRUE(Find(ToGrpcStatus(ResourceNotFound("lease", "abc")), &resource));
  EXPECT_EQ(resource.resource_type(), "lease");
  EXPECT_EQ(resource.resource_name(), "abc");
}

TEST(ToGrpcStatus, WordsOfARequestNeverSpoilTheDetails) {
  // Cut in the middle of a character by whoever quotes them, or at the limit of what is sent.
  const std::string cut = "'\xc3\xa9\xc3'", name = "x" + std::string(600, '\xc3');
  std::string accents = "x";
  for (int i = 0; i < 600; ++i) accents += "\xc3\xa9";
  google::rpc::BadRequest bad;
  ASSERT_TRUE(Find(ToGrpcStatus(InvalidField("tensors[0].name", cut)), &bad));
  EXPECT_EQ(bad.field_violations(0).description(), "tensors[0].name: '\xc3\xa9?'");
  for (const std::string& text :
       {name, accents, std::string("\xed\xa0\x80\xf4\x90\x80\x80\xc0\x80")}) {
    google::rpc::ResourceInfo resource;
    ASSERT_TRUE(Find(ToGrpcStatus(ResourceNotFound("model", text)), &resource));
    EXPECT_LE(resource.resource_name().size(), 1024u);
  }
}

TEST(ToGrpcStatus, OnlyWhatMaySucceedLaterPromisesARetry) {
  google::rpc::RetryInfo retry;
  google::rpc::ErrorInfo error;
  const auto full = ToGrpcStatus(RetryLater(absl::StatusCode::kResourceExhausted, "queue_full",
                                            "full", absl::Milliseconds(1250)));
  ASSERT_TRUE(Find(full, &retry));
  EXPECT_EQ(retry.retry_delay().seconds(), 1);
  EXPECT_EQ(retry.retry_delay().nanos(), 250'000'000);
  ASSERT_TRUE(Find(full, &error)) << "of what, so that a caller may do without";
  EXPECT_EQ(error.reason(), "QUEUE_FULL");

  const auto infeasible = ToGrpcStatus(DeadlineInfeasible("too late"));
  EXPECT_EQ(infeasible.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_FALSE(Find(infeasible, &retry));
  ASSERT_TRUE(Find(infeasible, &error));
  EXPECT_EQ(error.reason(), "DEADLINE_INFEASIBLE");
  EXPECT_EQ(error.domain(), "prefilld");
}

TEST(ToGrpcStatus, KeepsCodesAndFitsTrailers) {
  const std::string longest(100'000, 'x');
  for (int code = 1; code <= 16; ++code) {
    const auto status = ToGrpcStatus(absl::Status(static_cast<absl::StatusCode>(code), longest));
    EXPECT_EQ(status.error_code(), code);
    EXPECT_LT(status.error_message().size() + status.error_details().size(), 6000u);
  }
}

TEST(CodeName, NamesEveryCode) {
  EXPECT_STREQ(CodeName(grpc::StatusCode::OK), "OK");
  EXPECT_STREQ(CodeName(grpc::StatusCode::DATA_LOSS), "DATA_LOSS");
  EXPECT_STREQ(CodeName(grpc::StatusCode::UNAUTHENTICATED), "UNAUTHENTICATED");
  EXPECT_STREQ(CodeName(static_cast<grpc::StatusCode>(99)), "UNKNOWN");
}

}  // namespace
}  // namespace prefilld

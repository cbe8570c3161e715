#include "client/cpp/errors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "google/rpc/error_details.pb.h"

namespace prefilld::client {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

grpc::Status Refusal(grpc::StatusCode code,
                     const std::vector<const google::protobuf::Message*>& details) {
  google::rpc::Status status;
  for (const auto* detail : details) status.add_details()->PackFrom(*detail);
  return grpc::Status(code, "refused", status.SerializeAsString());
}

TEST(FromGrpc, KeepsCodeAndMessage) {
  EXPECT_TRUE(FromGrpc(grpc::Status::OK).ok());
  for (int code = 1; code <= 16; ++code) {
    const absl::Status status = FromGrpc(grpc::Status(static_cast<grpc::StatusCode>(code), "why"));
    EXPECT_EQ(static_cast<int>(status.code()), code);
    EXPECT_EQ(status.message(), "why");
  }
}

TEST(DetailLines, ShowsEveryDetail) {
  google::rpc::BadRequest bad;
  auto* violation = bad.add_field_violations();
  violation->set_field("sparsity.gamma");
  violation->set_description("2 is not below 1");
  google::rpc::ResourceInfo resource;
  resource.set_resource_type("model");
  resource.set_resource_name("none");
  google::rpc::ErrorInfo error;
  error.set_reason("DEADLINE_INFEASIBLE");
  google::rpc::RetryInfo retry;
  retry.mutable_retry_delay()->set_seconds(1);
  retry.mutable_retry_delay()->set_nanos(500000000);
  const absl::Status status =
      FromGrpc(Refusal(grpc::StatusCode::INVALID_ARGUMENT, {&retry, &bad, &resource, &error}));
  EXPECT_THAT(DetailLines(status), ElementsAre("sparsity.gamma: 2 is not below 1", "model: none",
                                               "reason: DEADLINE_INFEASIBLE", "retry in 1.5s"));
  EXPECT_EQ(RetryDelay(status), absl::Milliseconds(1500));
}

TEST(DetailLines, IsEmptyWithoutDetailsOrWithBrokenOnes) {
  EXPECT_THAT(DetailLines(absl::InternalError("x")), IsEmpty());
  EXPECT_THAT(
      DetailLines(FromGrpc(grpc::Status(grpc::StatusCode::INTERNAL, "x", "\xff\xff\xff\xff"))),
      IsEmpty());
  google::rpc::Status status;
  status.add_details()->set_type_url("type.googleapis.com/google.rpc.RetryInfo");
  status.mutable_details(0)->set_value("\xff");
  const absl::Status broken =
      FromGrpc(grpc::Status(grpc::StatusCode::UNAVAILABLE, "x", status.SerializeAsString()));
  EXPECT_EQ(RetryDelay(broken), std::nullopt);
  EXPECT_THAT(DetailLines(broken), IsEmpty());
}

}  // namespace
}  // namespace prefilld::client

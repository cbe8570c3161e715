// What the server shows of itself under TLS, and whom it asks for: files that may change while it
// runs. What is new is served to new connections; what cannot be used is not, and the log says why.
#pragma once

#include <openssl/types.h>

#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "server/rpc/watched_file.h"

namespace prefilld {

// PEM files. client_ca: what clients' certificates must be signed by; empty: none is asked for.
struct TlsPaths {
  std::string cert, key, client_ca;
};

class TlsFiles {
 public:
  // Read together, and good for each other.
  struct Pem {
    std::string cert, key, client_ca;
    // For who serves with OpenSSL. A client's certificate is verified where there is one, and none
    // is needed; sessions are not resumed.
    std::shared_ptr<SSL_CTX> context;
  };

  // NOT_FOUND names the flag whose file cannot be read, INVALID_ARGUMENT the one whose file holds
  // no PEM of its kind, or a key that is not the certificate's.
  static absl::StatusOr<std::unique_ptr<TlsFiles>> Open(const TlsPaths& paths);

  // Another object when the files have changed. Any thread.
  std::shared_ptr<const Pem> current() const {
    absl::MutexLock lock(&mutex_);
    return current_;
  }
  // Reads what has changed. False: what is there now cannot be used, current() is older. One call
  // at a time; reads files.
  bool Refresh();

 private:
  explicit TlsFiles(const TlsPaths& paths)
      : cert_(paths.cert), key_(paths.key), client_ca_(paths.client_ca) {}
  absl::StatusOr<std::shared_ptr<const Pem>> Read();

  WatchedFile cert_, key_, client_ca_;
  bool stale_ = false;
  mutable absl::Mutex mutex_;
  std::shared_ptr<const Pem> current_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace prefilld

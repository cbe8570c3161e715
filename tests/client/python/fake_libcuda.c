// As much of libcuda.so.1 as the client calls, with files in the place of device memory: what a
// test asks of the calls, their order and what they leave. Structures are written out as cuda.h has
// them.
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

typedef struct {
  int type, id;
} Location;
typedef struct {
  int type, handle_types;
  Location location;
  void* win32;
  struct {
    unsigned char compression, rdma;
    unsigned short usage;
    unsigned char reserved[4];
  } flags;
} Properties;
typedef struct {
  Location location;
  int flags;
} Access;

int fake_owner = 1;          // the GPU whose memory everything is
int fake_location_type = 1;  // a device
char fake_fails[64];         // the call that fails from now on
int fake_error;
int fake_depth, fake_imported, fake_reserved, fake_mapped;  // what there is now
char fake_log[4096];                                        // calls, in order

static int contexts[8];
static int current[16];
static int files[64];

static int Call(const char* name, int argument) {
  const size_t used = strlen(fake_log);
  snprintf(fake_log + used, sizeof fake_log - used, "%s(%d) ", name, argument);
  return strcmp(name, fake_fails) == 0 ? fake_error : 0;
}

int cuInit(unsigned flags) { return flags; }
int cuGetErrorString(int error, const char** text) {
  *text = "as the test wants it";
  return 0;
}
int cuDeviceGet(int* device, int ordinal) {
  *device = ordinal + 100;
  return ordinal < 8 ? 0 : 101;
}
int cuDevicePrimaryCtxRetain(void** context, int device) {
  *context = &contexts[device - 100];
  return Call("retain", device - 100);
}
int cuCtxPushCurrent_v2(void* context) {
  current[fake_depth++] = (int)((int*)context - contexts);
  return 0;
}
int cuCtxPopCurrent_v2(void** context) {
  fake_depth--;
  return 0;
}
int cuCtxSynchronize(void) { return Call("synchronize", current[fake_depth - 1]); }

int cuMemImportFromShareableHandle(uint64_t* handle, void* descriptor, int type) {
  const int error = Call("import", type);
  struct stat info;
  if (error != 0) return error;
  if (fstat((int)(uintptr_t)descriptor, &info) != 0 || !S_ISREG(info.st_mode)) return 1;
  files[fake_imported] = dup((int)(uintptr_t)descriptor);
  *handle = 1000 + fake_imported++;
  return 0;
}
int cuMemRelease(uint64_t handle) {
  close(files[--fake_imported]);
  return Call("release", 0);
}
int cuMemGetAllocationPropertiesFromHandle(Properties* properties, uint64_t handle) {
  memset(properties, 0, sizeof *properties);
  properties->type = 1;
  properties->handle_types = 1;
  properties->location.type = fake_location_type;
  properties->location.id = fake_owner;
  return Call("properties", 0);
}
int cuMemGetAllocationGranularity(size_t* unit, const Properties* properties, int option) {
  *unit = properties->location.id == fake_owner && option == 0 ? 4096 : 0;
  return Call("granularity", 0);
}
int cuMemAddressReserve(uint64_t* address, size_t size, size_t alignment, uint64_t hint,
                        unsigned long long flags) {
  const int error = Call("reserve", (int)size);
  if (error != 0) return error;
  void* at = mmap(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED || alignment != 0 || hint != 0 || flags != 0) return 2;
  *address = (uint64_t)at;
  fake_reserved++;
  return 0;
}
int cuMemAddressFree(uint64_t address, size_t size) {
  fake_reserved--;
  munmap((void*)address, size);
  return Call("free", (int)size);
}
int cuMemMap(uint64_t address, size_t size, size_t offset, uint64_t handle,
             unsigned long long flags) {
  const int error = Call("map", (int)size);
  struct stat info;
  const int file = files[handle - 1000];
  if (error != 0) return error;
  if (fstat(file, &info) != 0 || offset != 0 || flags != 0 || size > (size_t)info.st_size) return 1;
  if (mmap((void*)address, size, PROT_NONE, MAP_SHARED | MAP_FIXED, file, 0) == MAP_FAILED)
    return 2;
  fake_mapped++;
  return 0;
}
int cuMemSetAccess(uint64_t address, size_t size, const Access* access, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    if (access[i].location.type != 1 || access[i].flags != 3) return 1;
    const int error = Call("access", access[i].location.id);
    if (error != 0) return error;
  }
  return mprotect((void*)address, size, PROT_READ | PROT_WRITE);
}
int cuMemUnmap(uint64_t address, size_t size) {
  fake_mapped--;
  mmap((void*)address, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
  return Call("unmap", (int)size);
}
int cuMemcpyHtoD_v2(uint64_t to, const void* from, size_t bytes) {
  memcpy((void*)to, from, bytes);
  return Call("write", (int)bytes);
}
int cuMemcpyDtoH_v2(void* to, uint64_t from, size_t bytes) {
  memcpy(to, (void*)from, bytes);
  return Call("read", (int)bytes);
}

// A CUDA driver that does nothing but write down what it was asked for: libcuda.so.1 for a test of what arrives there through cuda-bindings.
//
// Knows: the driver's own calling conventions (pointers, sizes, the structures of virtual memory). Must not know: Python, kvguard.
// Each call is one line in the file that DRIVER_ON_PAPER names. Results are numbers that a test can tell apart.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef unsigned long long u64;
typedef struct { int type, id; } location;
typedef struct { int type, handles; location where; void *win32; struct { unsigned char compression, rdma; unsigned short usage; unsigned char rest[4]; } flags; } prop;
typedef struct { location where; int flags; } access_of;

static int note(const char *form, ...)
{
    FILE *paper = fopen(getenv("DRIVER_ON_PAPER"), "a");
    va_list values;
    va_start(values, form);
    vfprintf(paper, form, values);
    va_end(values);
    fputc('\n', paper);
    fclose(paper);
    return 0;
}

int cuGetProcAddress_v2(const char *name, void **found, int version, u64 flags, int *status)
{
    (void)version, (void)flags;
    *found = dlsym(RTLD_DEFAULT, name);
    if (!*found) {
        void *self = dlopen("libcuda.so.1", RTLD_NOLOAD | RTLD_NOW);
        *found = self ? dlsym(self, name) : 0;
    }
    if (status) *status = *found ? 0 : 1;
    return *found ? 0 : 500;
}
int cuGetProcAddress(const char *name, void **found, int version, u64 flags) { return cuGetProcAddress_v2(name, found, version, flags, 0); }
int cuInit(unsigned flags) { return note("cuInit %u", flags); }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuDeviceGet(int *device, int number) { *device = number; return 0; }
int cuDeviceGetUuid(unsigned char *uuid, int device) { for (int n = 0; n < 16; n++) uuid[n] = (unsigned char)(n + device + 240); return 0; }
int cuDeviceGetUuid_v2(unsigned char *uuid, int device) { return cuDeviceGetUuid(uuid, device); }
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = 1; return note("cuDeviceGetAttribute %d %d", attribute, device); }
int cuThreadExchangeStreamCaptureMode(int *mode) { static int now = 0; int before = now; now = *mode; *mode = before; return note("mode %d", now); }
int cuCtxGetStreamPriorityRange(int *lowest, int *highest) { *lowest = 0; *highest = -5; return 0; }
int cuStreamCreateWithPriority(u64 *stream, unsigned flags, int priority) { *stream = 0xabc000; return note("cuStreamCreateWithPriority %u %d", flags, priority); }
int cuStreamIsCapturing(u64 stream, int *status) { *status = stream == 0xca97; note("cuStreamIsCapturing %llx", stream); return stream ? 0 : 906; }
int cuEventQuery(u64 event) { note("cuEventQuery %llx", event); return event == 0xbad ? 700 : event == 0x1a7e ? 600 : 0; }
int cuStreamDestroy(u64 stream) { return note("cuStreamDestroy %llx", stream); }
int cuStreamDestroy_v2(u64 stream) { return cuStreamDestroy(stream); }
int cuStreamWriteValue64(u64 stream, u64 address, uint64_t value, unsigned flags)
{
    return note("cuStreamWriteValue64 %llx %llx %llx %u", stream, address, (u64)value, flags);
}
int cuStreamWriteValue64_v2(u64 stream, u64 address, uint64_t value, unsigned flags) { return cuStreamWriteValue64(stream, address, value, flags); }
int cuMemHostGetDevicePointer(u64 *found, u64 host, unsigned flags) { *found = host + 0x1000000000000ull; return note("cuMemHostGetDevicePointer %u", flags); }
int cuMemGetAddressRange(u64 *base, size_t *size, u64 address) { *base = address & ~0xfffffull; *size = 1 << 20; return 0; }
int cuPointerGetAttribute(void *value, int attribute, u64 address)
{
    if (attribute == 10) *(unsigned char *)value = address >= 0x7f0000000000ull;           // legacy handles: a byte
    else if (attribute == 13) *(unsigned char *)value = 1;                                  // mapped: a byte
    else if (attribute == 14) *(u64 *)value = 9;                                            // handle types: descriptor and fabric
    else if (attribute == 18) *(size_t *)value = 4 << 20;
    else if (attribute == 19) *(u64 *)value = address & ~0x3fffffull;
    else return 1;
    return note("cuPointerGetAttribute %d %llx", attribute, address);
}
int cuMemGetAllocationGranularity(size_t *size, const prop *made, int option) { *size = 2 << 20; return note("cuMemGetAllocationGranularity %d %d", made->type, option); }
int cuMemCreate(u64 *handle, size_t size, const prop *made, u64 flags)
{
    *handle = 0xf000000000000077ull;
    return note("cuMemCreate %zu type %d handles %d where %d %d rdma %d compression %d flags %llu", size, made->type, made->handles, made->where.type,
                made->where.id, made->flags.rdma, made->flags.compression, flags);
}
int cuMemRelease(u64 handle) { return note("cuMemRelease %llx", handle); }
int cuMemRetainAllocationHandle(u64 *handle, u64 address) { *handle = 0x78; return note("cuMemRetainAllocationHandle %llx", address); }
int cuMemExportToShareableHandle(void *out, u64 handle, int type, u64 flags)
{
    *(int *)out = 41; // a descriptor is an int
    return note("cuMemExportToShareableHandle %llx %d %llu", handle, type, flags);
}
int cuMemImportFromShareableHandle(u64 *handle, void *from, int type)
{
    *handle = 0x79;
    return note("cuMemImportFromShareableHandle %lld %d", (long long)(intptr_t)from, type);
}
int cuMemAddressReserve(u64 *address, size_t size, size_t alignment, u64 wish, u64 flags)
{
    *address = 0xa000000000ull;
    return note("cuMemAddressReserve %zu %zu %llx %llu", size, alignment, wish, flags);
}
int cuMemAddressFree(u64 address, size_t size) { return note("cuMemAddressFree %llx %zu", address, size); }
int cuMemMap(u64 address, size_t size, size_t offset, u64 handle, u64 flags) { return note("cuMemMap %llx %zu %zu %llx %llu", address, size, offset, handle, flags); }
int cuMemSetAccess(u64 address, size_t size, const access_of *who, size_t count)
{
    return note("cuMemSetAccess %llx %zu where %d %d flags %d count %zu", address, size, who->where.type, who->where.id, who->flags, count);
}
int cuMemUnmap(u64 address, size_t size) { return note("cuMemUnmap %llx %zu", address, size); }

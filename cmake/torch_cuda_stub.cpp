// Stands in for libtorch_cuda.so when libtaskloom_cuda.so is linked, so that the latter names it as needed and leaves nothing undefined
// where torch is a CPU-only build. Never installed, never called.
#define STUB extern "C" __attribute__((visibility("default")))

STUB int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }
STUB int torch_c10_cuda_check_msg(int, const char*, const char*, unsigned, bool, char**) { return 1; }
STUB void torch_c10_cuda_free_error_msg(char*) {}

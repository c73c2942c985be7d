// Scratch memory that each thread keeps between calls, so that a call does not allocate.
#pragma once

#include <cstdlib>
#include <cstring>

namespace {

// A buffer that grows to the largest size that was asked for. Aligned to cache lines; zeros when it is new.
template <class T>
struct Growable {
    T* data = nullptr;
    size_t size = 0;

    ~Growable() { std::free(data); }                            // threads come and go

    T* get(size_t n) {
        if (n > size) {
            std::free(data);
            size = (n + 63) / 64 * 64;                          // whole cache lines of any T
            data = (T*)std::aligned_alloc(64, size * sizeof(T));
            std::memset((void*)data, 0, size * sizeof(T));
        }
        return data;
    }
};

// This thread's buffer of a name, for n elements, valid until the same name is used again:
// `float* logits = scratch<float, struct Logits>(n)`. A name that is first declared inside a function is its own.
template <class T, class Name>
inline T* scratch(size_t n) {
    static thread_local Growable<T> buffer;
    return buffer.get(n);
}

}  // namespace

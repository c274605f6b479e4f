// SPDX-License-Identifier: MIT
#pragma once
/// @file  Build-wide macros: the inline namespace of the instruction set, assertions, forced inlining, host+device marks.
///
/// FOVEA_ABI names the instruction set that this translation unit is compiled for. All of fovea lives in
/// `fovea::FOVEA_ABI`, so objects compiled for different instruction sets never share a weak symbol: the linker cannot
/// hand an AVX-512 copy of a helper to code that runs on an older processor.

#include <cstdlib>

#if defined(FOVEA_FORCE_SCALAR)
#define FOVEA_ABI abi_scalar
#elif defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#if defined(__AVX512VNNI__)
#define FOVEA_ABI abi_avx512_vnni
#else
#define FOVEA_ABI abi_avx512
#endif
#define FOVEA_HAS_AVX512 1
#elif defined(__AVX2__) && defined(__FMA__)
#if defined(__AVXVNNI__)
#define FOVEA_ABI abi_avx2_vnni
#else
#define FOVEA_ABI abi_avx2
#endif
#define FOVEA_HAS_AVX2 1
#elif defined(__SSE2__)
#define FOVEA_ABI abi_sse2
#define FOVEA_HAS_SSE2 1
#elif defined(__aarch64__)
#if defined(__ARM_FEATURE_MATMUL_INT8)
#define FOVEA_ABI abi_neon64_i8mm
#elif defined(__ARM_FEATURE_DOTPROD)
#define FOVEA_ABI abi_neon64_dotprod
#else
#define FOVEA_ABI abi_neon64
#endif
#define FOVEA_HAS_NEON64 1
#else
#define FOVEA_ABI abi_scalar
#endif

#if defined(__CUDACC__)
#define FOVEA_HD __host__ __device__
#else
#define FOVEA_HD
#endif

#if defined(_MSC_VER)
#define FOVEA_INLINE __forceinline
#define FOVEA_NOINLINE __declspec(noinline)
#define FOVEA_INLINE_LAMBDA
#define FOVEA_RESTRICT __restrict
#else
#define FOVEA_INLINE inline __attribute__((always_inline))
#define FOVEA_NOINLINE __attribute__((noinline))
#define FOVEA_INLINE_LAMBDA __attribute__((always_inline))
#define FOVEA_RESTRICT __restrict__
#endif

/// Before a loop of constant length that is to have no branch.
#if defined(__clang__)
#define FOVEA_UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
#define FOVEA_UNROLL _Pragma("GCC unroll 32")
#else
#define FOVEA_UNROLL
#endif

#if defined(__cpp_exceptions) || defined(__EXCEPTIONS) || defined(_CPPUNWIND)
#define FOVEA_HAS_EXCEPTIONS 1
#endif

/// Compiled once. Where FOVEA_COMPILED is defined, the functions that hold the loops are declared and not defined: the objects of a
/// program then compile in seconds in place of half a minute and more each. Each mechanism that the program uses has an object of its
/// own, which defines FOVEA_COMPILED as well, includes the headers of the mechanisms that this one is made of, redefines the three
/// macros below and then includes its header; any_attention::make is compiled by registry.hpp. In CMake the target fovea::compiled
/// (cmake/compiled.cmake) does all of it, for the flags of the project. Without FOVEA_COMPILED everything is inline.
#if defined(FOVEA_COMPILED)
#define FOVEA_DEFINES_LOOPS 0
#else
#define FOVEA_DEFINES_LOOPS 1
#endif
#define FOVEA_DEFINITION inline
#define FOVEA_INSTANTIATE(...)

/// What a build without exceptions does with a violated contract. Define it before the first fovea header to replace it.
#ifndef FOVEA_ABORT
#define FOVEA_ABORT(message) ((void)(message), std::abort())
#endif

/// Internal invariants: checked in debug builds and wherever FOVEA_CHECK_INVARIANTS is defined, free otherwise.
#ifndef FOVEA_ASSERT
#if !defined(NDEBUG) || defined(FOVEA_CHECK_INVARIANTS)
#define FOVEA_ASSERT(condition) ((condition) ? (void)0 : std::abort())
#else
#define FOVEA_ASSERT(condition) ((void)0)
#endif
#endif

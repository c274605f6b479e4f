// SPDX-License-Identifier: MIT
#pragma once
/// @file  `any_attention::make`: a mechanism from its name and parameters; the table of all mechanisms.
///
///   any_attention a = any_attention::make({"softmax", {{"causal", true}, {"window", 256.0}}});
///   any_attention b = any_attention::make({"linear", {{"map", "t2r"}}}, {{"W", w}, {"b", bias}});
///
/// Contract   the keys and tensors of each mechanism are in docs/configuration.md; an unknown mechanism, key or tensor, a wrong
///            type or a NaN is refused by a sentence that names it and says what is known. JSON: interop/json.hpp.
/// Cost       `make` pulls every mechanism into the object that calls it, a minute of compile time; core/config.hpp tells how a program
///            with several such objects compiles it once (FOVEA_COMPILED).
/// Note       <mech>/configure.hpp includes <fovea/core/any.hpp>, not this header.

#include <span>

#include <fovea/core/any.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

struct registered_mechanism {
  const char* name;
  any_attention (*configure)(configuration_reader&);
};

/// Every mechanism that a configuration can name.
std::span<const registered_mechanism> registered_mechanisms();

}  // namespace FOVEA_ABI
}  // namespace fovea

#if !defined(FOVEA_COMPILED)
#include <fovea/registry.hpp>
#endif

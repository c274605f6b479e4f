// SPDX-License-Identifier: MIT
#pragma once
/// @file  `any_attention::make`: a mechanism from its name and parameters; the table of all mechanisms.
///
///   any_attention a = any_attention::make({"softmax", {{"causal", true}, {"window", 256.0}}});
///   any_attention b = any_attention::make({"linear", {{"map", "t2r"}}}, {{"W", w}, {"b", bias}});
///
/// Contract   the keys and tensors of each mechanism are in docs/configuration.md; an unknown mechanism, key or tensor, a wrong
///            type or a NaN is refused by a sentence that names it and says what is known. JSON: interop/json.hpp.
/// Note       <mech>/configure.hpp includes <fovea/core/any.hpp>, not this header.

#include <span>

#include <fovea/core/any.hpp>
#include <fovea/dijiang/configure.hpp>
#include <fovea/efficient/configure.hpp>
#include <fovea/hybrid/configure.hpp>
#include <fovea/linear/configure.hpp>
#include <fovea/linformer/configure.hpp>
#include <fovea/softmax/configure.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

struct registered_mechanism {
  const char* name;
  any_attention (*configure)(configuration_reader&);
};

/// Every mechanism that a configuration can name.
inline std::span<const registered_mechanism> registered_mechanisms() {
  static constexpr registered_mechanism table[] = {
      {"softmax", configure_softmax},     {"linear", configure_linear},
      {"dijiang", configure_dijiang},     {"linformer", configure_linformer},
      {"efficient", configure_efficient}, {"kfree_reconstruction", configure_kfree_reconstruction},
      {"hybrid", configure_hybrid},
  };
  return table;
}

inline any_attention any_attention::make(const configuration& c, const arrays& tensors) {
  std::vector<std::string> known;
  for (const auto& entry : registered_mechanisms()) {
    known.emplace_back(entry.name);
    if (c.mechanism != entry.name) continue;
    configuration_reader reader(c, tensors);
    any_attention a = entry.configure(reader);
    reader.finish();
    a.config_ = std::make_shared<const configuration>(c);
    a.inputs_ = std::make_shared<const std::set<std::string>>(reader.call_inputs());
    return a;
  }
  fail("mechanism is \"" + c.mechanism + "\"; wanted one of " + detail::join(known));
}

}  // namespace FOVEA_ABI
}  // namespace fovea

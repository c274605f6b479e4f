// SPDX-License-Identifier: MIT
#pragma once
/// @file  The table of all mechanisms behind any_attention::make. <fovea/any_attention.hpp> includes it, unless FOVEA_COMPILED says
///        that another object of the program holds it: that object is
///
///   #include <fovea/registry.hpp>
///   FOVEA_COMPILE_REGISTRY

#include <fovea/any_attention.hpp>
#include <fovea/dijiang/configure.hpp>
#include <fovea/efficient/configure.hpp>
#include <fovea/hybrid/configure.hpp>
#include <fovea/linear/configure.hpp>
#include <fovea/linformer/configure.hpp>
#include <fovea/nystrom/configure.hpp>
#include <fovea/softmax/configure.hpp>
#include <fovea/windowed/configure.hpp>

/// Makes the functions below exist in this object, for others that were compiled with FOVEA_COMPILED.
#define FOVEA_COMPILE_REGISTRY                                                                      \
  namespace fovea {                                                                                 \
  inline namespace FOVEA_ABI {                                                                      \
  extern const void* const compiled_registry[2];                                                    \
  const void* const compiled_registry[2] = {reinterpret_cast<const void*>(&any_attention::make),    \
                                            reinterpret_cast<const void*>(&registered_mechanisms)}; \
  }                                                                                                 \
  }

namespace fovea {
inline namespace FOVEA_ABI {

inline std::span<const registered_mechanism> registered_mechanisms() {
  static constexpr registered_mechanism table[] = {
      {"softmax", configure_softmax},     {"linear", configure_linear},
      {"dijiang", configure_dijiang},     {"linformer", configure_linformer},
      {"efficient", configure_efficient}, {"kfree_reconstruction", configure_kfree_reconstruction},
      {"hybrid", configure_hybrid},       {"windowed", configure_windowed},
      {"nystrom", configure_nystrom},
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

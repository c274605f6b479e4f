// SPDX-License-Identifier: MIT
#pragma once
/// @file  efficient_attention and kfree_reconstruction from a configuration: normalisation, causal, scale and tensor lengths; form, scale.

#include <fovea/core/any.hpp>
#include <fovea/core/configure_lengths.hpp>
#include <fovea/efficient.hpp>

namespace fovea {
inline namespace FOVEA_ABI {

inline any_attention configure_efficient(configuration_reader& r) {
  using kind = efficient_normalisation;
  efficient_attention m;
  m.normalisation =
      r.choice<kind>("normalisation", {{"softmax", kind::softmax}, {"scaling", kind::scaling}}, kind::softmax);
  m.causal = r.flag("causal", false);
  m.scale = r.number("scale");
  auto lengths = std::make_shared<std::vector<std::int32_t>>(detail::lengths_of(r));
  m.lengths = *lengths;
  m.check_settings();
  return any_attention::hold(m, lengths);
}

inline any_attention configure_kfree_reconstruction(configuration_reader& r) {
  using form = kfree_reconstruction::form_type;
  kfree_reconstruction m;
  m.form =
      r.choice<form>("form", {{"efficient", form::efficient}, {"context", form::context}, {"channel", form::channel}},
                     form::efficient);
  m.scale = r.number("scale");
  efficient_attention{.scale = m.scale}.check_settings();
  return any_attention::hold(m);
}

}  // namespace FOVEA_ABI
}  // namespace fovea

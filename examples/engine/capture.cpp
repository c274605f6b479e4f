// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <map>

#include <fovea/interop/safetensors.hpp>

#include "error.hpp"
#include "setup.hpp"
#include "text.hpp"

namespace engine {
namespace {

/// q, k, v of one layer, filled as the parts of a call come.
struct captured {
  fovea::array q, k, v;
};

void put(fovea::array& to, const fovea::view<const float>& from, isize first) {
  for (isize h = 0; h < from.heads; ++h)
    for (isize i = 0; i < from.length; ++i)
      for (isize c = 0; c < from.width; ++c)
        fovea::store_from_double(to.type() == fovea::element::f16 ? fovea::dtype::f16 : fovea::dtype::f32,
                                 to.mutable_data(), (h * to.dim(1) + first + i) * from.width + c,
                                 static_cast<double>(from(0, h, i, c)));
}

std::string path_of(const std::string& output, isize layer, bool only) {
  if (only) return output;
  const std::filesystem::path p(output);
  const std::string name = p.stem().string() + ".layer" + std::to_string(layer) + p.extension().string();
  return (p.parent_path() / name).string();
}

}  // namespace

int capture(const capture_options& o) {
  setup s(o);
  const model_config& c = s.net.config();
  const std::vector<token> ids = read_tokens(o.input, o.model, !o.input.ends_with(".bin"));
  if (o.count < 1 || o.offset < 0 || o.offset + o.count > static_cast<std::int64_t>(ids.size()))
    refuse("tokens ", o.offset, " to ", o.offset + o.count, " are asked for; ", o.input, " has ", ids.size());
  std::map<isize, captured> layers;
  const auto type = o.half ? fovea::element::f16 : fovea::element::f32;
  for (const isize l : o.layers) {
    if (l < 0 || l >= c.layers) refuse("layer ", l, " does not exist; the model has ", c.layers);
    const auto room = [&](isize heads) { return fovea::array(type, {heads, o.count, c.head_dim}); };
    layers[l] = {room(c.heads), room(c.kv_heads), room(c.kv_heads)};  // a copy of an array shares its data
  }
  session run(s.net, s.plan, s.threads, {.cache = o.cache});
  run.on_attention = [&](const attention_inputs& in) {
    const auto at = layers.find(in.layer);
    if (at == layers.end()) return;
    put(at->second.q, in.q, in.first), put(at->second.k, in.k, in.first), put(at->second.v, in.v, in.first);
  };
  sequence text = run.make_sequence();
  const auto some = std::span(ids).subspan(static_cast<std::size_t>(o.offset), static_cast<std::size_t>(o.count));
  run.forward({{text, some}}, logits_of::none);
  for (auto& [layer, x] : layers) {
    const std::string path = path_of(o.output, layer, layers.size() == 1);
    fovea::write_safetensors(
        path, {{"q", x.q}, {"k", x.k}, {"v", x.v}},
        {{"model", std::filesystem::path(o.model).filename().string()},
         {"layer", std::to_string(layer)},
         {"tokens", std::to_string(o.count)},
         {"text", std::filesystem::path(o.input).filename().string() + ", token " + std::to_string(o.offset) + " on"},
         {"scale", std::to_string(1 / std::sqrt(static_cast<double>(c.head_dim)))},
         {"causal", "1"}});
    std::printf("%s\n", path.c_str());
  }
  return 0;
}

}  // namespace engine

// SPDX-License-Identifier: MIT
#include "layer_attention.hpp"

#include <algorithm>
#include <iterator>
#include <numeric>
#include <optional>

#include <fovea/hybrid/stores.hpp>
#include <fovea/position/rotate.hpp>
#include <fovea/softmax.hpp>
#include <fovea/softmax/stores.hpp>

namespace engine {
namespace {

/// Heads a, a + s, a + 2 s, ... of a [rows, all, d] buffer are a view; others are gathered.
isize step_of(std::span<const isize> heads) {
  const isize step = heads.size() > 1 ? heads[1] - heads[0] : 1;
  for (std::size_t i = 2; i < heads.size(); ++i)
    if (heads[i] - heads[i - 1] != step) return 0;
  return step;
}

template <class T>
fovea::view<T> heads_view(T* data, isize rows, isize all, isize d, std::span<const isize> heads, isize step) {
  const auto count = static_cast<isize>(heads.size());
  return {data + heads[0] * d, 1, count, rows, d, rows * all * d, step * d, all * d};
}

void copy_heads(const float* from, isize from_heads, float* to, isize to_heads, isize rows, isize d,
                std::span<const isize> heads, bool back) {
  for (isize i = 0; i < rows; ++i)
    for (std::size_t x = 0; x < heads.size(); ++x) {
      const isize many = heads[x], few = static_cast<isize>(x);
      const float* source = from + (i * from_heads + (back ? few : many)) * d;
      std::copy(source, source + d, to + (i * to_heads + (back ? many : few)) * d);
    }
}

}  // namespace

const fovea::softmax_attention* plain_softmax(const head_group& g) {
  const auto* m = g.mechanism.as<fovea::softmax_attention>();
  return m != nullptr && m->store.kind == fovea::state_store::form::contiguous ? m : nullptr;
}

std::size_t sequence::bytes() const {
  std::size_t total = 0;
  for (const layer& l : layers_) {
    for (const fovea::contiguous_store& s : l.stores) total += s.bytes();
    for (const fovea::state& s : l.states) total += s.bytes();
  }
  return total;
}

layer_attention::layer_attention(const model_config& c, attention_plan plan, isize context, fovea::dtype cache)
    : config_(c),
      plan_(std::move(plan)),
      context_(context),
      cache_(cache),
      table_({.base = c.rope_theta, .width = c.head_dim, .positions = context, .scaling = c.rope_scaling}),
      rope_(table_) {
  for (const layer_plan& layer : plan_.layers) {
    bool first = false;
    for (const head_group& g : layer) first = first || plain_softmax(g) == nullptr;
    turns_first_.push_back(first);
    stores_.push_back(lay_out(layer));
  }
}

layer_attention::layer_stores layer_attention::lay_out(const layer_plan& layer) const {
  layer_stores out;
  const isize d = config_.head_dim;
  const auto shape_of = [&](const head_group& g) -> std::optional<fovea::kv_shape> {
    if (const auto* m = plain_softmax(g); m != nullptr)
      return fovea::kv_shape{.heads = 0,
                             .d = d,
                             .e = d,
                             .type = m->store.type.value_or(cache_),
                             .scale = m->store.scale,
                             .form = m->store.layout,
                             .rotated = m->store.rotated};
    if (g.mechanism.as<fovea::hybrid_attention>() != nullptr)
      return fovea::kv_shape{.heads = 0, .d = d, .e = d, .type = cache_};
    return std::nullopt;
  };
  const auto places = [](const layer_store& s, const std::vector<isize>& heads) {
    std::vector<isize> at;
    for (const isize h : heads)
      at.push_back(std::lower_bound(s.kv_heads.begin(), s.kv_heads.end(), h) - s.kv_heads.begin());
    return at;
  };
  std::vector<std::vector<isize>> wanted;
  for (const head_group& g : layer) {
    const auto shape = shape_of(g);
    const std::vector<isize> heads = kv_heads_of(config_, g.heads);
    wanted.push_back(heads);
    store_heads at;
    if (shape) {
      at.store = 0;
      while (at.store < std::ssize(out.stores) && out.stores[static_cast<std::size_t>(at.store)].shape != *shape)
        ++at.store;
      if (at.store == std::ssize(out.stores)) out.stores.push_back({*shape, {}});
      std::vector<isize>&held = out.stores[static_cast<std::size_t>(at.store)].kv_heads, both;
      std::set_union(held.begin(), held.end(), heads.begin(), heads.end(), std::back_inserter(both));
      held = both;
    }
    out.groups.push_back(at);
  }
  for (layer_store& s : out.stores) {
    const auto stands_apart = [&](std::size_t x) {  // heads in equal steps, but not among those that the store holds
      return out.groups[x].store == &s - out.stores.data() && step_of(places(s, wanted[x])) == 0;
    };
    bool apart = false;
    for (std::size_t x = 0; x < wanted.size(); ++x) apart = apart || stands_apart(x);
    if (!apart) continue;
    s.kv_heads.resize(static_cast<std::size_t>(config_.kv_heads));
    std::iota(s.kv_heads.begin(), s.kv_heads.end(), isize{0});
  }
  for (std::size_t x = 0; x < out.groups.size(); ++x) {
    store_heads& at = out.groups[x];
    if (at.store < 0) continue;
    const std::vector<isize> held = places(out.stores[static_cast<std::size_t>(at.store)], wanted[x]);
    at.first = held[0], at.count = std::ssize(held), at.step = step_of(held);
  }
  for (layer_store& s : out.stores) s.shape.heads = std::ssize(s.kv_heads);
  return out;
}

sequence layer_attention::make_sequence() const {
  sequence s;
  const isize d = config_.head_dim;
  for (std::size_t l = 0; l < plan_.layers.size(); ++l) {
    sequence::layer& layer = s.layers_.emplace_back();
    for (const layer_store& store : stores_[l].stores) layer.stores.emplace_back(store.shape, context_);
    for (std::size_t x = 0; x < plan_.layers[l].size(); ++x) {
      const head_group& g = plan_.layers[l][x];
      const auto heads = std::ssize(g.heads), kv_heads = std::ssize(kv_heads_of(config_, g.heads));
      if (plain_softmax(g) != nullptr) {
        layer.states.emplace_back();
      } else if (const auto* hybrid = g.mechanism.as<fovea::hybrid_attention>(); hybrid != nullptr) {
        fovea::kv_shape rows = stores_[l].stores[static_cast<std::size_t>(stores_[l].groups[x].store)].shape;
        rows.heads = kv_heads;
        layer.states.push_back(fovea::make_summaries(*hybrid, heads, rows, context_));
      } else {
        layer.states.push_back(g.mechanism.make_state(
            {.B = 1, .H = heads, .G = kv_heads, .n = 0, .m = context_, .d = d, .e = d, .type = fovea::dtype::f32}));
      }
    }
  }
  return s;
}

fovea::kv_sequence layer_attention::rows_of(const sequence& s, isize layer, std::size_t group) const {
  const auto l = static_cast<std::size_t>(layer);
  const store_heads& at = stores_[l].groups[group];
  return fovea::some_heads(s.layers_[l].stores[static_cast<std::size_t>(at.store)].view(), at.first, at.count, at.step);
}

void layer_attention::turn(fovea::exec_ref exec, std::span<const sequence_rows> parts, float* q, float* k) const {
  const isize d = config_.head_dim, H = config_.heads, G = config_.kv_heads;
  for (const sequence_rows& p : parts) {
    const fovea::row_positions at{.first = p.to->tokens()};
    const auto queries = fovea::bnhd(q + p.first * H * d, 1, p.count, H, d);
    const auto keys = fovea::bnhd(k + p.first * G * d, 1, p.count, G, d);
    fovea::rotate(exec, rope_, queries, at, queries);
    fovea::rotate(exec, rope_, keys, at, keys);
  }
}

/// The tensors of one group of heads: views of the layer's, or of gathered copies where its heads are no arithmetic progression.
struct layer_attention::call {
  fovea::view<const float> q, k, v;
  fovea::view<float> out;
};

std::span<std::byte> layer_attention::scratch(std::size_t bytes) {
  if (scratch_.size() < bytes) scratch_ = fovea::buffer(bytes);
  return scratch_.span();
}

/// The new rows of all sequences into the layer's stores.
void layer_attention::append(isize layer, std::span<const sequence_rows> parts, isize rows, const float* k,
                             const float* v, bool turned) {
  const auto l = static_cast<std::size_t>(layer);
  const isize d = config_.head_dim, G = config_.kv_heads;
  for (std::size_t x = 0; x < stores_[l].stores.size(); ++x) {
    const std::vector<isize>& heads = stores_[l].stores[x].kv_heads;
    const isize step = step_of(heads), few = std::ssize(heads);
    fovea::view<const float> keys, values;
    if (step != 0) {
      keys = heads_view(k, rows, G, d, heads, step), values = heads_view(v, rows, G, d, heads, step);
    } else {
      gathered_.resize(static_cast<std::size_t>(2 * few * rows * d));
      float *gk = gathered_.data(), *gv = gk + few * rows * d;
      copy_heads(k, G, gk, few, rows, d, heads, false), copy_heads(v, G, gv, few, rows, d, heads, false);
      keys = fovea::bnhd<const float>(gk, 1, rows, few, d), values = fovea::bnhd<const float>(gv, 1, rows, few, d);
    }
    for (const sequence_rows& p : parts)
      p.to->layers_[l].stores[x].append(keys.slice(p.first, p.count), values.slice(p.first, p.count),
                                        turned ? nullptr : &rope_);
  }
}

/// All sequences in one call: each is a problem of its own, and few of them would not fill the threads.
void layer_attention::attend_stores(fovea::exec_ref exec, const fovea::softmax_attention& m, isize layer,
                                    std::size_t group, std::span<const sequence_rows> parts, const call& c) {
  std::vector<fovea::kv_sequence> kv;
  std::vector<std::int32_t> cu{0};
  for (const sequence_rows& p : parts) {
    kv.push_back(rows_of(*p.to, layer, group));
    cu.push_back(static_cast<std::int32_t>(p.first + p.count));
  }
  const std::size_t need = fovea::workspace_size(m, c.q, kv, exec.concurrency(), cu);
  fovea::prefill(exec, m, c.q, kv, c.out, {.cu_q = cu, .workspace = scratch(need)});
}

void layer_attention::attend(fovea::exec_ref exec, isize layer, std::size_t group, std::span<const sequence_rows> parts,
                             const call& c, bool turned) {
  const head_group& g = plan_.layers[static_cast<std::size_t>(layer)][group];
  if (const auto* exact = plain_softmax(g); exact != nullptr) {
    fovea::softmax_attention m = *exact;
    m.turn = turned ? nullptr : &rope_;
    return attend_stores(exec, m, layer, group, parts, c);
  }
  attend_states(exec, g.mechanism, layer, group, parts, c);
}

/// Sequences with many new rows have all threads, one after the other; the steps of the others are a task each.
void layer_attention::attend_states(fovea::exec_ref exec, const fovea::any_attention& m, isize layer, std::size_t group,
                                    std::span<const sequence_rows> parts, const call& c) {
  constexpr isize few_rows = 16;
  const auto* hybrid = m.as<fovea::hybrid_attention>();
  const auto memory_of = [&](const sequence_rows& p) -> fovea::state& {
    return p.to->layers_[static_cast<std::size_t>(layer)].states[group];
  };
  const auto prefill = [&](fovea::exec_ref e, const sequence_rows& p, std::span<std::byte> memory) {
    const auto rows = [&](const auto& x) { return x.slice(p.first, p.count); };
    fovea::state& state = memory_of(p);
    if (hybrid != nullptr)
      fovea::prefill(e, *hybrid, rows(c.q), rows_of(*p.to, layer, group), rows(c.out), state, {.workspace = memory});
    else
      fovea::prefill(e, m, rows(c.q), rows(c.k), rows(c.v), rows(c.out), state, {.workspace = memory});
  };
  const auto need = [&](const sequence_rows& p, int threads) {
    if (hybrid != nullptr) {
      const auto l = static_cast<std::size_t>(layer);
      const store_heads& at = stores_[l].groups[group];
      fovea::kv_shape shape = stores_[l].stores[static_cast<std::size_t>(at.store)].shape;
      shape.heads = at.count;
      return fovea::store_workspace_size(*hybrid, c.q.slice(p.first, p.count), shape,
                                         rows_of(*p.to, layer, group).length, threads);
    }
    const isize held = memory_of(p).tokens();
    return m.state_workspace_size({1, c.q.heads, c.k.heads, p.count, p.count + held, c.q.width, c.v.width}, threads);
  };
  std::vector<sequence_rows> steps;
  std::size_t largest = 0;
  for (const sequence_rows& p : parts)
    if (exec.concurrency() > 1 && parts.size() > 1 && p.count <= few_rows)
      steps.push_back(p), largest = std::max(largest, need(p, 1));
    else
      prefill(exec, p, scratch(need(p, exec.concurrency())));
  constexpr std::size_t line = 64;
  const std::size_t each = (largest + line - 1) / line * line;
  const std::span<std::byte> memory = scratch(each * static_cast<std::size_t>(exec.concurrency()));
  exec.for_tasks(static_cast<isize>(steps.size()), [&](isize i, isize slot) {
    prefill(fovea::serial, steps[static_cast<std::size_t>(i)],
            memory.subspan(static_cast<std::size_t>(slot) * each, each));
  });
}

void layer_attention::run(fovea::exec_ref exec, isize layer, std::span<const sequence_rows> parts, isize rows,
                          const float* q, const float* k, const float* v, float* out, bool turned) {
  const layer_plan& groups = plan_.layers[static_cast<std::size_t>(layer)];
  const isize d = config_.head_dim, H = config_.heads, G = config_.kv_heads;
  append(layer, parts, rows, k, v, turned);
  for (std::size_t x = 0; x < groups.size(); ++x) {
    const std::vector<isize>& heads = groups[x].heads;
    const std::vector<isize> kv = kv_heads_of(config_, heads);
    const isize step = step_of(heads), kv_step = step_of(kv);
    const auto keys = heads_view(k, rows, G, d, kv, kv_step), values = heads_view(v, rows, G, d, kv, kv_step);
    if (step != 0) {
      attend(exec, layer, x, parts,
             {heads_view(q, rows, H, d, heads, step), keys, values, heads_view(out, rows, H, d, heads, step)}, turned);
      continue;
    }
    const auto h = static_cast<isize>(heads.size());
    gathered_.resize(static_cast<std::size_t>(2 * h * rows * d));
    float *gq = gathered_.data(), *go = gq + h * rows * d;
    copy_heads(q, H, gq, h, rows, d, heads, false);
    attend(exec, layer, x, parts,
           {fovea::bnhd<const float>(gq, 1, rows, h, d), keys, values, fovea::bnhd(go, 1, rows, h, d)}, turned);
    copy_heads(go, h, out, H, rows, d, heads, true);
  }
}

}  // namespace engine

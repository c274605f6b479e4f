// SPDX-License-Identifier: MIT
#include "session.hpp"

#include <algorithm>
#include <chrono>

#include <fovea/core/workspace.hpp>

#include "dense.hpp"
#include "error.hpp"

namespace engine {
namespace {

/// Floats at a multiple of 64 bytes that only grow: where memory lies must not decide which elements a loop takes one by one.
class numbers {
 public:
  void resize(std::size_t count) {
    if (memory_.size() < count * sizeof(float)) memory_ = fovea::buffer(count * sizeof(float));
  }
  float* data() const { return reinterpret_cast<float*>(memory_.data()); }

 private:
  fovea::buffer memory_;
};

/// Adds the time since the last call to one of the profile's counters.
class stopwatch {
 public:
  void add(double& counter) {
    const auto now = std::chrono::steady_clock::now();
    counter += std::chrono::duration<double>(now - last_).count();
    last_ = now;
  }

 private:
  std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
};

}  // namespace

/// Rows of one part of a call: what fits into options.rows.
struct session::part {
  std::vector<sequence_rows> sequences;
  std::vector<std::size_t> pieces;    // of each of them, which piece of the call
  std::vector<std::uint32_t> tokens;  // of all rows
  std::vector<isize> wanted;          // rows whose logits are wanted
  isize rows() const { return static_cast<isize>(tokens.size()); }
};

struct session::body {
  body(const model& m, attention_plan plan, fovea::exec_ref e, const session_options& o)
      : net(m), exec(e), options(o), attention(m.config(), std::move(plan), o.context, o.cache) {}

  const model& net;
  fovea::exec_ref exec;
  session_options options;
  layer_attention attention;
  numbers hidden, normed, q, k, v, mixed, gate, up, last, result;

  void reserve(isize rows) {
    const model_config& c = net.config();
    const auto size = [&](numbers& x, isize width) { x.resize(static_cast<std::size_t>(rows * width)); };
    size(hidden, c.width), size(normed, c.width);
    size(q, c.heads * c.head_dim), size(mixed, c.heads * c.head_dim);
    size(k, c.kv_heads * c.head_dim), size(v, c.kv_heads * c.head_dim);
    size(gate, c.mlp_width), size(up, c.mlp_width);
  }
};

session::session(const model& m, attention_plan plan, fovea::exec_ref exec, const session_options& options) {
  check_plan(plan, m.config());
  session_options o = options;
  if (o.context == 0) o.context = m.config().context;
  if (o.context < 1 || o.rows < 1)
    refuse("context and rows are ", o.context, ", ", o.rows, "; they must be at least 1");
  body_ = std::make_unique<body>(m, std::move(plan), exec, o);
}
session::~session() = default;

const model& session::of() const { return body_->net; }
const attention_plan& session::plan() const { return body_->attention.plan(); }
const session_options& session::options() const { return body_->options; }
sequence session::make_sequence() const { return body_->attention.make_sequence(); }

void session::check(std::span<const piece> pieces) const {
  for (std::size_t x = 0; x < pieces.size(); ++x) {
    const piece& p = pieces[x];
    const auto n = static_cast<isize>(p.tokens.size());
    if (p.to.tokens() + n > body_->options.context)
      refuse("the sequence has ", p.to.tokens(), " tokens and ", n, " more are given; the context holds ",
             body_->options.context);
    for (const std::uint32_t t : p.tokens)
      if (static_cast<isize>(t) >= of().config().vocabulary)
        refuse("token ", t, " does not exist; the vocabulary has ", of().config().vocabulary);
    for (std::size_t y = 0; y < x; ++y)
      if (&pieces[y].to == &p.to) refuse("a sequence has two pieces in one call");
  }
}

std::vector<session::part> session::cut(std::span<const piece> pieces, logits_of which) const {
  std::vector<part> parts;
  for (std::size_t x = 0; x < pieces.size(); ++x) {
    const auto tokens = pieces[x].tokens;
    for (std::size_t done = 0; done < tokens.size();) {
      if (parts.empty() || parts.back().rows() == body_->options.rows) parts.emplace_back();
      part& p = parts.back();
      const auto room = static_cast<std::size_t>(body_->options.rows - p.rows());
      const std::size_t count = std::min(room, tokens.size() - done);
      const isize first = p.rows();
      p.sequences.push_back({&pieces[x].to, first, static_cast<isize>(count)});
      p.pieces.push_back(x);
      p.tokens.insert(p.tokens.end(), tokens.begin() + static_cast<std::ptrdiff_t>(done),
                      tokens.begin() + static_cast<std::ptrdiff_t>(done + count));
      done += count;
      for (isize r = first; r < p.rows(); ++r)
        if (which == logits_of::all || (which == logits_of::last && done == tokens.size() && r + 1 == p.rows()))
          p.wanted.push_back(r);
    }
  }
  return parts;
}

logits session::forward(std::span<const piece> pieces, logits_of which) {
  check(pieces);
  const std::vector<part> parts = cut(pieces, which);
  isize wanted = 0, done = 0;
  for (const part& p : parts) wanted += static_cast<isize>(p.wanted.size());
  const isize vocabulary = of().config().vocabulary;
  body_->result.resize(static_cast<std::size_t>(wanted * vocabulary));
  for (const part& p : parts) {
    run(p, body_->result.data() + done * vocabulary);
    done += static_cast<isize>(p.wanted.size());
  }
  return {body_->result.data(), wanted, vocabulary};
}

/// One part through all layers; logits of its wanted rows to `out`.
void session::run(const part& p, float* out) {
  body& b = *body_;
  const model_config& c = b.net.config();
  const isize rows = p.rows();
  stopwatch watch;
  b.reserve(rows);
  for (isize r = 0; r < rows; ++r)
    widen_row(b.net.embedding(), p.tokens[static_cast<std::size_t>(r)], b.hidden.data() + r * c.width);
  watch.add(spent.other);
  for (isize l = 0; l < c.layers; ++l) {
    if (on_hidden) on_hidden(l, rows, b.hidden.data());
    attention_block(p, l);
    mlp_block(rows, l);
  }
  for (const sequence_rows& s : p.sequences) s.to->tokens_ += s.count;
  if (p.wanted.empty() && !on_hidden) return;
  output(p, out);
}

void session::attention_block(const part& p, isize l) {
  body& b = *body_;
  const model_config& c = b.net.config();
  const layer_weights& w = b.net.layer(l);
  const isize rows = p.rows();
  stopwatch watch;
  rms_norm(b.exec, b.hidden.data(), rows, w.attention_norm, c.rms_eps, b.normed.data());
  watch.add(spent.other);
  const product qkv[] = {{&w.q, b.q.data()}, {&w.k, b.k.data()}, {&w.v, b.v.data()}};
  multiply(b.exec, b.normed.data(), rows, qkv);
  watch.add(spent.dense);
  const bool turned = static_cast<bool>(on_attention) || b.attention.turns_first(l);
  if (turned) b.attention.turn(b.exec, p.sequences, b.q.data(), b.k.data());
  for (std::size_t x = 0; on_attention && x < p.sequences.size(); ++x) {
    const sequence_rows& s = p.sequences[x];
    const auto rows_of = [&](const numbers& data, isize heads) {
      return fovea::bnhd<const float>(data.data() + s.first * heads * c.head_dim, 1, s.count, heads, c.head_dim);
    };
    on_attention({l, static_cast<isize>(p.pieces[x]), s.to->tokens(), rows_of(b.q, c.heads), rows_of(b.k, c.kv_heads),
                  rows_of(b.v, c.kv_heads)});
  }
  b.attention.run(b.exec, l, p.sequences, rows, b.q.data(), b.k.data(), b.v.data(), b.mixed.data(), turned);
  watch.add(spent.attention);
  const product o[] = {{&w.o, b.hidden.data(), true}};
  multiply(b.exec, b.mixed.data(), rows, o);
  watch.add(spent.dense);
}

void session::mlp_block(isize rows, isize l) {
  body& b = *body_;
  const model_config& c = b.net.config();
  const layer_weights& w = b.net.layer(l);
  stopwatch watch;
  rms_norm(b.exec, b.hidden.data(), rows, w.mlp_norm, c.rms_eps, b.normed.data());
  watch.add(spent.other);
  const product wide[] = {{&w.gate, b.gate.data()}, {&w.up, b.up.data()}};
  multiply(b.exec, b.normed.data(), rows, wide);
  watch.add(spent.dense);
  swiglu(b.exec, b.gate.data(), b.up.data(), rows, c.mlp_width);
  watch.add(spent.other);
  const product down[] = {{&w.down, b.hidden.data(), true}};
  multiply(b.exec, b.gate.data(), rows, down);
  watch.add(spent.dense);
}

void session::output(const part& p, float* out) {
  body& b = *body_;
  const model_config& c = b.net.config();
  const isize rows = p.rows(), wanted = static_cast<isize>(p.wanted.size());
  stopwatch watch;
  rms_norm(b.exec, b.hidden.data(), rows, b.net.final_norm(), c.rms_eps, b.normed.data());
  if (on_hidden) on_hidden(c.layers, rows, b.normed.data());
  b.last.resize(static_cast<std::size_t>(wanted * c.width));
  for (isize i = 0; i < wanted; ++i) {
    const float* from = b.normed.data() + p.wanted[static_cast<std::size_t>(i)] * c.width;
    std::copy(from, from + c.width, b.last.data() + i * c.width);
  }
  watch.add(spent.other);
  const product all[] = {{&b.net.output(), out}};
  if (wanted > 0) multiply(b.exec, b.last.data(), wanted, all);
  watch.add(spent.output);
}

}  // namespace engine

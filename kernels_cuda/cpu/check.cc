// Runs every function of the C ABI over awkward shapes against float64, each array ending at a page that may not be
// touched: `cmake -DMINDJAX_SANITIZE=ON` builds it with the sanitizers, which do not see what masked vector
// instructions and tile loads read. Prints what is wrong and exits with 1.
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "launch_cpu.h"

namespace {

std::mt19937 generator(0);
int failures = 0;

// An array of T that ends where a page without access begins.
template <class T>
class Guarded {
 public:
  explicit Guarded(int64_t size) : size_(size) {
    const size_t page = size_t(sysconf(_SC_PAGESIZE));
    length_ = (size_t(size) * sizeof(T) + page - 1) / page * page + page;
    base_ = static_cast<char*>(mmap(nullptr, length_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(base_ + length_ - page, page, PROT_NONE);
    data_ = reinterpret_cast<T*>(base_ + length_ - page) - size;
    std::memset(data_, 0xff, size_t(size) * sizeof(T));  // NaN
  }
  ~Guarded() { munmap(base_, length_); }
  Guarded(const Guarded&) = delete;
  T* get() { return data_; }
  T& operator[](int64_t i) { return data_[i]; }
  int64_t size() const { return size_; }

 private:
  int64_t size_;
  size_t length_;
  char* base_;
  T* data_;
};

float widen(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float x;
  std::memcpy(&x, &wide, 4);
  return x;
}
float value(float x) { return x; }
float value(uint16_t x) { return widen(x); }
void set(float& to, float x) { to = x; }
void set(uint16_t& to, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  to = uint16_t(bits >> 16);
}

template <class T>
void fill(Guarded<T>& array, int64_t count) {
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < count; ++i) set(array[i], normal(generator));
}

template <class T>
void compare(const char* what, Guarded<T>& got, const std::vector<double>& wanted, double bound) {
  double difference = 0, norm = 0;
  for (int64_t i = 0; i < got.size(); ++i) {
    const double d = double(value(got[i])) - wanted[size_t(i)];
    difference += d * d;
    norm += wanted[size_t(i)] * wanted[size_t(i)];
  }
  if (!(std::sqrt(difference) <= bound * std::sqrt(norm))) {
    std::printf("%s: ||difference|| %.3g, ||reference|| %.3g\n", what, std::sqrt(difference), std::sqrt(norm));
    ++failures;
  }
}

void ok(const char* what, int status) {
  if (status == MJK_OK) return;
  std::printf("%s: status %d, %s\n", what, status, mjk_last_error());
  ++failures;
}

template <class T>
void products(void* pool, mjk_dtype type, int64_t k, int64_t n, const std::vector<int32_t>& sizes, int64_t rows) {
  const int64_t groups = int64_t(sizes.size());
  int64_t used = 0;
  for (int32_t size : sizes) used += size;
  Guarded<int32_t> sizes_(groups);
  std::memcpy(sizes_.get(), sizes.data(), sizes.size() * 4);
  Guarded<T> x(rows * k), w(groups * k * n), g(rows * n), out(rows * n), dx(rows * k);
  Guarded<float> dw(groups * k * n);
  fill(x, used * k), fill(w, groups * k * n), fill(g, used * n);
  std::vector<double> out_(size_t(rows * n)), dx_(size_t(rows * k)), dw_(size_t(groups * k * n));
  for (int64_t group = 0, row = 0; group < groups; ++group)
    for (int64_t end = row + sizes[size_t(group)]; row < end; ++row)
      for (int64_t i = 0; i < k; ++i)
        for (int64_t j = 0; j < n; ++j) {
          const int64_t at = (group * k + i) * n + j;
          const double xi = value(x[row * k + i]), gj = value(g[row * n + j]), wij = value(w[at]);
          out_[size_t(row * n + j)] += xi * wij;
          dx_[size_t(row * k + i)] += gj * wij;
          dw_[size_t(at)] += xi * gj;
        }
  // Of one bfloat16 number, which some of these results are, rounding moves up to 2^-8.
  const double bound = type == MJK_F32 ? 1e-6 : 1.0 / 256 + 1e-6;
  ok("gmm", mjk_gmm(pool, type, type, rows, k, n, groups, groups, 0, x.get(), w.get(), sizes_.get(), out.get()));
  compare("gmm", out, out_, bound);
  ok("gmm_t", mjk_gmm_t(pool, type, type, rows, k, n, groups, groups, 0, g.get(), w.get(), sizes_.get(), dx.get()));
  compare("gmm_t", dx, dx_, bound);
  ok("tgmm", mjk_tgmm(pool, type, MJK_F32, 0, rows, k, n, groups, groups, 0, x.get(), g.get(), sizes_.get(), dw.get()));
  compare("tgmm", dw, dw_, 1e-6);
  ok("tgmm", mjk_tgmm(pool, type, MJK_F32, 1, rows, k, n, groups, groups, 0, x.get(), g.get(), sizes_.get(), dw.get()));
  for (double& v : dw_) v *= 2;
  compare("tgmm, added", dw, dw_, 1e-6);
  if (groups != 1 || used != rows) return;
  Guarded<float> bias(n);
  fill(bias, n);
  for (size_t i = 0; i < out_.size(); ++i) out_[i] += bias[int64_t(i) % n];
  ok("linear", mjk_linear(pool, type, rows, k, n, x.get(), w.get(), bias.get(), out.get()));
  compare("linear", out, out_, bound);
}

void quantised(void* pool, int64_t k, int64_t n, int32_t size, int64_t rows) {
  const int64_t k_blocks = (k + 127) / 128, n_blocks = (n + 127) / 128;
  Guarded<float> x(rows * k), xs(rows * k_blocks), ws(n_blocks * k_blocks), rows_scale(rows), columns_scale(n);
  Guarded<uint8_t> q(rows * k), w(n * k);
  Guarded<float> out(rows * n);
  Guarded<int32_t> sizes(1);
  sizes[0] = size;
  fill(x, rows * k), fill(ws, ws.size()), fill(rows_scale, rows), fill(columns_scale, n);
  ok("quantize", mjk_quantize_e4m3(pool, MJK_F32, rows, rows, k, x.get(), nullptr, q.get(), xs.get()));
  for (int64_t i = 0; i < n * k; ++i) w[i] = uint8_t(0x30 + i % 7);
  ok("fp8", mjk_gmm_fp8(pool, MJK_F32, rows, k, n, 1, 1, 0, q.get(), xs.get(), w.get(), ws.get(), sizes.get(),
                        out.get()));
  ok("s8", mjk_gmm_s8(pool, MJK_F32, rows, k, n, 1, 1, 0, q.get(), rows_scale.get(), w.get(), columns_scale.get(),
                      sizes.get(), out.get()));
  std::vector<double> wanted(size_t(rows * n));
  for (int64_t i = 0; i < size; ++i)
    for (int64_t j = 0; j < n; ++j) {
      for (int64_t c = 0; c < k; ++c) wanted[size_t(i * n + j)] += int8_t(q[i * k + c]) * int8_t(w[j * k + c]);
      wanted[size_t(i * n + j)] *= double(rows_scale[i]) * columns_scale[j];
    }
  compare("s8", out, wanted, 1e-6);
}

template <class T>
void rows_ops(void* pool, mjk_dtype type, int64_t rows, int64_t k) {
  const int64_t choices = 3;
  Guarded<T> x(rows * 2 * k), picked(rows * choices * 2 * k), summed(rows * 2 * k), y(rows * k), d(rows * k),
      d_in(rows * 2 * k);
  Guarded<int32_t> index(rows * choices);
  Guarded<float> weight(rows * choices), d_scale(rows);
  fill(x, x.size()), fill(d, d.size()), fill(weight, weight.size());
  for (int64_t i = 0; i < index.size(); ++i) index[i] = i % 5 == 4 ? -1 : int32_t(i * 7 % rows);
  ok("permute", mjk_permute(pool, type, rows, rows * choices, 2 * k, x.get(), index.get(), picked.get()));
  ok("unpermute", mjk_unpermute(pool, type, rows, rows, choices, 2 * k, x.get(), index.get(), weight.get(),
                                summed.get()));
  ok("swiglu", mjk_swiglu(pool, type, rows, k, x.get(), weight.get(), y.get()));
  ok("swiglu_grad", mjk_swiglu_grad(pool, type, rows, k, x.get(), weight.get(), d.get(), d_in.get(), d_scale.get()));
  std::vector<double> picked_, summed_(size_t(rows * 2 * k)), y_;
  for (int64_t i = 0; i < index.size(); ++i)
    for (int64_t c = 0; c < 2 * k; ++c) {
      const double v = index[i] < 0 ? 0 : value(x[index[i] * 2 * k + c]);
      picked_.push_back(v);
      summed_[size_t(i / choices * 2 * k + c)] += v * weight[i];
    }
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t c = 0; c < k; ++c) {
      const double gate = value(x[i * 2 * k + c]), up = value(x[i * 2 * k + k + c]);
      y_.push_back(gate / (1 + std::exp(-gate)) * up * weight[i]);
    }
  const double bound = type == MJK_F32 ? 1e-6 : 4e-3;
  compare("permute", picked, picked_, 0);
  compare("unpermute", summed, summed_, bound);
  compare("swiglu", y, y_, bound);
}

template <class T>
void finite(const char* what, Guarded<T>& got) {
  for (int64_t i = 0; i < got.size(); ++i)
    if (!std::isfinite(value(got[i]))) {
      std::printf("%s: number %lld of %lld is not finite\n", what, (long long)i, (long long)got.size());
      ++failures;
      return;
    }
}

// Attention's values against float64; of the rest what the sanitizers and the guard pages see, tests/ops/test_fused.py
// has the values.
template <class T>
void attention(void* pool, mjk_dtype type, int64_t length, int64_t dim, bool causal) {
  const int64_t batch = 2, heads = 4, kv_heads = 2;
  const mjk_attention_shape shape = {batch, length, length, heads, kv_heads, dim};
  Guarded<T> q(batch * length * heads * dim), k(batch * length * kv_heads * dim), v(k.size()), out(q.size()), g(q.size()),
      dq(q.size()), dk(k.size()), dv(k.size());
  Guarded<int32_t> segments(batch * length), index(length);
  Guarded<float> normaliser(batch * heads * length);
  fill(q, q.size()), fill(k, k.size()), fill(v, v.size()), fill(g, g.size());
  for (int64_t i = 0; i < segments.size(); ++i) segments[i] = int32_t(1 + i % length * 2 / length);
  for (int64_t t = 0; t < length; ++t) index[t] = causal ? int32_t(t) : -1;
  ok("attention", mjk_attention(pool, type, &shape, q.get(), k.get(), v.get(), segments.get(), segments.get(), index.get(),
                                out.get(), normaliser.get()));
  ok("attention_grad", mjk_attention_grad(pool, type, &shape, q.get(), k.get(), v.get(), segments.get(), segments.get(),
                                          index.get(), out.get(), normaliser.get(), g.get(), dq.get(), dk.get(),
                                          dv.get()));
  std::vector<double> wanted(size_t(out.size()));
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t t = 0; t < length; ++t)
      for (int64_t h = 0; h < heads; ++h) {
        double total = 0;
        double* row = &wanted[size_t(((b * length + t) * heads + h) * dim)];
        for (int64_t s = 0; s < length; ++s) {
          if (segments[b * length + s] != segments[b * length + t] || (causal && s > t)) continue;
          double score = 0;
          const int64_t key = ((b * length + s) * kv_heads + h / 2) * dim;
          for (int64_t d = 0; d < dim; ++d)
            score += double(value(q[((b * length + t) * heads + h) * dim + d])) * value(k[key + d]);
          const double weight = std::exp(score / std::sqrt(double(dim)));
          total += weight;
          for (int64_t d = 0; d < dim; ++d) row[d] += weight * value(v[key + d]);
        }
        for (int64_t d = 0; d < dim; ++d) row[d] /= total;
      }
  compare("attention", out, wanted, type == MJK_F32 ? 1e-6 : 1e-2);
  finite("dq", dq), finite("dk", dk), finite("dv", dv);

  const int64_t capacity = 5, step = 4;
  const mjk_decode_shape decode = {1, batch, batch, heads, kv_heads, dim, length, capacity};
  Guarded<T> new_q(batch * heads * dim), new_k(batch * kv_heads * dim), new_v(new_k.size()), answer(new_q.size()),
      own_k(batch * kv_heads * capacity * dim), own_v(own_k.size());
  Guarded<int32_t> place(1), at(1), prompt(batch);
  place[0] = 0, at[0] = int32_t(step);
  for (int64_t row = 0; row < batch; ++row) prompt[row] = int32_t(batch - 1 - row);
  fill(new_q, new_q.size()), fill(new_k, new_k.size()), fill(new_v, new_v.size());
  fill(own_k, own_k.size()), fill(own_v, own_v.size());
  ok("decode", mjk_decode_attention(pool, type, &decode, new_q.get(), new_k.get(), new_v.get(), k.get(), v.get(),
                                    own_k.get(), own_v.get(), segments.get(), prompt.get(), place.get(), at.get(),
                                    answer.get()));
  finite("decode", answer);
}

template <class T>
void elementwise(void* pool, mjk_dtype type, int64_t rows, int64_t size) {
  Guarded<T> x(rows * size), y(x.size()), g(x.size()), dx(x.size()), dy(x.size()), scale(size), bias(size);
  Guarded<float> d_scale(size), d_bias(size), cosine(rows * (size / 2)), sine(cosine.size());
  fill(x, x.size()), fill(g, g.size()), fill(scale, size), fill(bias, size);
  fill(cosine, cosine.size()), fill(sine, sine.size());
  for (int32_t centred : {0, 1}) {
    ok("norm", mjk_norm(pool, type, centred, rows, size, 1e-6f, x.get(), scale.get(), bias.get(), y.get()));
    finite("norm", y);
    ok("norm_grad", mjk_norm_grad(pool, type, centred, rows, size, 1e-6f, x.get(), scale.get(), g.get(), dx.get(),
                                  d_scale.get(), d_bias.get()));
    finite("norm, dx", dx), finite("norm, d_scale", d_scale);
  }
  Guarded<float> logits(x.size()), logp(rows), entropy(rows), normaliser(rows), d_logp(rows), d_entropy(rows);
  Guarded<int32_t> targets(rows), count(1);
  Guarded<float> temperature(1);
  fill(logits, logits.size()), fill(d_logp, rows), fill(d_entropy, rows);
  for (int64_t r = 0; r < rows; ++r) targets[r] = int32_t(r % 2 ? size - 1 : 0);
  temperature[0] = 0.7f, count[0] = int32_t(rows - rows / 3);
  ok("logprobs", mjk_logprobs(pool, rows, size, logits.get(), targets.get(), temperature.get(), count.get(), logp.get(),
                              entropy.get(), normaliser.get()));
  ok("logprobs_grad",
     mjk_logprobs_grad(pool, type, rows, size, logits.get(), targets.get(), temperature.get(), count.get(),
                       normaliser.get(), entropy.get(), d_logp.get(), d_entropy.get(), dx.get()));
  finite("logprobs", logp), finite("logprobs, entropy", entropy), finite("logprobs, d_logits", dx);
  Guarded<float> wide(x.size());
  fill(wide, wide.size());
  for (int32_t exact : {0, 1}) {
    ok("gelu", mjk_bias_gelu(pool, type, type, exact, rows, size, x.get(), bias.get(), y.get(), nullptr));
    ok("gelu_grad",
       mjk_bias_gelu_grad(pool, type, exact, rows, size, x.get(), bias.get(), g.get(), dx.get(), d_bias.get()));
    finite("gelu", y), finite("gelu, dx", dx), finite("gelu, d_bias", d_bias);
    ok("wide gelu", mjk_bias_gelu(pool, MJK_F32, type, exact, rows, size, wide.get(), bias.get(), y.get(), dy.get()));
    finite("wide gelu", y), finite("wide gelu, sum", dy);
  }
  ok("sum_rows", mjk_sum_rows(pool, type, rows, size, x.get(), d_bias.get()));
  finite("sum_rows", d_bias);
  ok("silu", mjk_silu_product(pool, type, rows * size, x.get(), g.get(), y.get()));
  ok("silu_grad", mjk_silu_product_grad(pool, type, rows * size, x.get(), g.get(), g.get(), dx.get(), dy.get()));
  finite("silu", y), finite("silu, d_gate", dx), finite("silu, d_up", dy);
  if (size % 2 == 0) {
    ok("rope", mjk_rope(pool, type, rows, 1, size, 1.0f, x.get(), cosine.get(), sine.get(), y.get()));
    finite("rope", y);
  }
}

void routing(void* pool, int64_t rows, int64_t length, int64_t experts, int64_t choices) {
  const int64_t tokens = rows * length;
  Guarded<float> logits(tokens * experts), probabilities(logits.size()), d_probabilities(logits.size()),
      d_logits(logits.size()), shares(logits.size());
  Guarded<float> weights(tokens * choices), d_weights(weights.size()), scales(weights.size());
  Guarded<int32_t> segments(tokens), chosen(weights.size()), token(weights.size()), back(weights.size()), load(experts);
  fill(logits, logits.size()), fill(d_weights, d_weights.size()), fill(d_probabilities, logits.size());
  for (int64_t t = 0; t < tokens; ++t) segments[t] = int32_t(t / 3 % 4);
  ok("choose", mjk_choose_experts(pool, tokens, experts, choices, 1, logits.get(), segments.get(), weights.get(),
                                  chosen.get(), probabilities.get()));
  ok("choose_grad",
     mjk_choose_experts_grad(pool, tokens, experts, choices, 1, chosen.get(), probabilities.get(), d_weights.get(),
                             d_probabilities.get(), d_logits.get()));
  ok("sort", mjk_sort_by_expert(tokens, experts, choices, chosen.get(), weights.get(), token.get(), back.get(),
                                load.get(), scales.get()));
  ok("shares", mjk_expert_shares(pool, rows, length, experts, choices, chosen.get(), segments.get(), shares.get()));
  finite("choose", weights), finite("choose, probabilities", probabilities), finite("choose, d_logits", d_logits);
  finite("sort", scales), finite("shares", shares);
}

}  // namespace

int main() {
  for (int32_t threads : {1, 3}) {
    const mjk_pool* pool = mjk_pool_create(threads);
    void* stream = const_cast<mjk_pool*>(pool);
    for (const auto& [k, n] : {std::pair<int64_t, int64_t>{1, 1}, {33, 7}, {96, 64}, {129, 65}, {40, 300}}) {
      for (const std::vector<int32_t>& sizes : std::vector<std::vector<int32_t>>{
               {0, 0, 0}, {0, 0, 4, 2}, {0, 33, 0}, {1, 63, 0, 65}, {16, 32, 48}}) {
        int64_t rows = 0;
        for (int32_t size : sizes) rows += size;
        for (int64_t tail : {0, 3}) {
          products<float>(stream, MJK_F32, k, n, sizes, rows + tail);
          products<uint16_t>(stream, MJK_BF16, k, n, sizes, rows + tail);
        }
      }
      quantised(stream, k, n, 19, 21);
      rows_ops<float>(stream, MJK_F32, 11, k);
      rows_ops<uint16_t>(stream, MJK_BF16, 11, k);
      elementwise<float>(stream, MJK_F32, 300, k);
      elementwise<uint16_t>(stream, MJK_BF16, 300, k);
    }
    for (const auto& [experts, choices] : {std::pair<int64_t, int64_t>{1, 1}, {7, 3}, {8, 2}, {130, 8}})
      for (int64_t length : {1, 40}) routing(stream, 3, length, experts, choices);
    for (const auto& [length, dim] : {std::pair<int64_t, int64_t>{1, 8}, {33, 24}, {70, 64}})
      for (bool causal : {false, true}) {
        attention<float>(stream, MJK_F32, length, dim, causal);
        attention<uint16_t>(stream, MJK_BF16, length, dim, causal);
      }
    products<uint16_t>(stream, MJK_BF16, 2100, 40, {5, 40}, 45);  // more of k than is packed at a time
    products<float>(stream, MJK_F32, 400, 40, {5, 40}, 45);
    products<uint16_t>(stream, MJK_BF16, 40, 48, {2100}, 2100);
    products<uint16_t>(stream, MJK_BF16, 40, 70, {50}, 50);
    products<float>(stream, MJK_F32, 40, 70, {50}, 50);
    mjk_pool_destroy(pool);
  }
  std::printf("%s: %d failures\n", mjk_isa(), failures);
  return failures != 0;
}

//! The bidirectional encoder: one for every family of the BERT kind and both backends.
//!
//! Devlin et al. 2018. Texts of a batch stand one behind the other, without padding, so a batch
//! costs what its tokens cost and a text has the same numbers in any company. What a runtime makes
//! of the hidden states (pooling, normalisation) is not decided here. Deliberately absent: pairs of
//! segments (every row is of type 0), the pooler, heads for classification and masked words.

use hearth_kernels::activation::Gelu;

use crate::backend::{Backend, Heads};
use crate::batch::LoraRows;
use crate::config::EncoderConfig;
use crate::layers::linear::Linear;
use crate::weights::{EncoderRole, Loader};
use crate::{Error, Result, TextEncoder};

/// Whole texts, one forward pass. `T` is the number of rows, `S` the number of texts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EncoderBatch {
    /// Token of each row. `[T]`
    pub tokens: Vec<u32>,
    /// Position of each row in its text. `[T]`
    pub positions: Vec<u32>,
    /// Rows of text `s` are `cu_q[s]..cu_q[s + 1]`. `[S + 1]`
    pub cu_q: Vec<u32>,
}

impl Default for EncoderBatch {
    fn default() -> Self {
        Self { tokens: Vec::new(), positions: Vec::new(), cu_q: vec![0] }
    }
}

impl EncoderBatch {
    /// Adds a text.
    pub fn push(&mut self, tokens: &[u32]) {
        self.tokens.extend_from_slice(tokens);
        self.positions.extend(0..tokens.len() as u32);
        self.cu_q.push(self.tokens.len() as u32);
    }

    /// Every number against the model, before a kernel relies on them.
    fn check(&self, config: &EncoderConfig) -> Result<()> {
        let wrong = |what: String| Err(Error::Batch(what));
        let rows = self.tokens.len();
        if self.cu_q.first() != Some(&0)
            || self.cu_q.last() != Some(&(rows as u32))
            || !self.cu_q.is_sorted()
            || self.positions.len() != rows
        {
            return wrong("cu_q or positions do not cover the rows".to_owned());
        }
        if let Some(id) = self.tokens.iter().find(|&&id| id as usize >= config.vocab_len) {
            return wrong(format!("token {id} is beyond the vocabulary"));
        }
        if let Some(place) = self.positions.iter().find(|&&p| p as usize >= config.context_len) {
            return wrong(format!("position {place} is beyond what the model was made for"));
        }
        Ok(())
    }
}

/// An encoder with its weights.
pub struct Encoder<B: Backend> {
    config: EncoderConfig,
    ops: B,
    /// `[vocab, hidden]`
    tokens: B::Matrix,
    /// `[context, hidden]`
    positions: B::Matrix,
    /// `[types, hidden]`
    types: B::Matrix,
    norm: Norm<B>,
    layers: Vec<Layer<B>>,
}

/// A layer norm.
struct Norm<B: Backend> {
    /// `[hidden]`
    weight: B::Vector,
    /// `[hidden]`
    bias: B::Vector,
    eps: f32,
}

struct Layer<B: Backend> {
    /// `[hidden, hidden]`
    q: Linear<B>,
    /// `[hidden, hidden]`
    k: Linear<B>,
    /// `[hidden, hidden]`
    v: Linear<B>,
    /// `[hidden, hidden]`
    out: Linear<B>,
    attention_norm: Norm<B>,
    /// `[ffn, hidden]`
    up: Linear<B>,
    /// `[hidden, ffn]`
    down: Linear<B>,
    output_norm: Norm<B>,
    heads: Heads,
    gelu: Gelu,
}

type Weights<'a> = Loader<'a, EncoderConfig>;

impl<B: Backend> Encoder<B> {
    /// Takes every weight out of the file, once. A tensor that the architecture has no use for is
    /// an error, but for heads that only training used.
    pub fn load(config: EncoderConfig, loader: &mut Weights<'_>, ops: B) -> Result<Self> {
        loader.check()?;
        let mut matrix = |role| loader.matrix(role, |source| ops.matrix(source));
        let tokens = matrix(EncoderRole::Tokens)?;
        let positions = matrix(EncoderRole::Positions)?;
        let types = matrix(EncoderRole::Types)?;
        let norm = Norm::load(loader, &ops, EncoderRole::Norm, config.norm_eps)?;
        let layers = (0..config.layer_count)
            .map(|layer| Layer::load(&config, layer, loader, &ops))
            .collect::<Result<_>>()?;
        Ok(Self { config, tokens, positions, types, norm, layers, ops })
    }

    /// The last hidden states. `[T, hidden]`
    fn hidden(&self, batch: &EncoderBatch) -> Result<B::Rows> {
        let ops = &self.ops;
        let x = ops.embed(&self.tokens, &batch.tokens)?;
        let x = ops.add(x, &ops.embed(&self.positions, &batch.positions)?)?;
        let x = ops.add(x, &ops.embed(&self.types, &vec![0; batch.tokens.len()])?)?;
        let mut x = self.norm.forward(ops, x)?;
        for layer in &self.layers {
            x = layer.forward(ops, x, &batch.cu_q)?;
        }
        Ok(x)
    }
}

impl<B: Backend> TextEncoder for Encoder<B> {
    fn config(&self) -> &EncoderConfig {
        &self.config
    }

    fn forward(&self, batch: &EncoderBatch) -> Result<Vec<f32>> {
        batch.check(&self.config)?;
        match batch.tokens.is_empty() {
            true => Ok(Vec::new()),
            false => self.ops.read(self.hidden(batch)?),
        }
    }
}

impl<B: Backend> Norm<B> {
    fn load(loader: &mut Weights<'_>, ops: &B, role: EncoderRole, eps: f32) -> Result<Self> {
        let weight = ops.vector(loader.vector(role)?)?;
        let bias = loader.bias(role)?.expect("a norm needs its bias, checked; this is a bug");
        Ok(Self { weight, bias: ops.vector(bias)?, eps })
    }

    fn forward(&self, ops: &B, x: B::Rows) -> Result<B::Rows> {
        ops.layer_norm(&x, &self.weight, &self.bias, self.eps)
    }
}

impl<B: Backend> Layer<B> {
    fn load(c: &EncoderConfig, layer: usize, loader: &mut Weights<'_>, ops: &B) -> Result<Self> {
        use EncoderRole::{AttentionNorm, Down, K, Out, OutputNorm, Q, Up, V};
        Ok(Self {
            q: Linear::load(loader, ops, Q(layer))?,
            k: Linear::load(loader, ops, K(layer))?,
            v: Linear::load(loader, ops, V(layer))?,
            out: Linear::load(loader, ops, Out(layer))?,
            attention_norm: Norm::load(loader, ops, AttentionNorm(layer), c.norm_eps)?,
            up: Linear::load(loader, ops, Up(layer))?,
            down: Linear::load(loader, ops, Down(layer))?,
            output_norm: Norm::load(loader, ops, OutputNorm(layer), c.norm_eps)?,
            heads: c.heads(),
            gelu: c.gelu,
        })
    }

    /// Attention and MLP, each added to its input and then normalised.
    fn forward(&self, ops: &B, x: B::Rows, cu_q: &[u32]) -> Result<B::Rows> {
        let lora = &LoraRows::default();
        let [q, k, v] = Linear::forward_many(ops, &x, [&self.q, &self.k, &self.v], lora)?;
        let mixed = ops.bidirectional([&q, &k, &v], cu_q, &self.heads)?;
        let mixed = self.out.forward(ops, &mixed, lora)?;
        let x = self.attention_norm.forward(ops, ops.add(x, &mixed)?)?;
        let wide = ops.gelu(self.up.forward(ops, &x, lora)?, self.gelu)?;
        let narrow = self.down.forward(ops, &wide, lora)?;
        self.output_norm.forward(ops, ops.add(x, &narrow)?)
    }
}

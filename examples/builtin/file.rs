//! The model as one GGUF: numbers, vocabulary, template.

use std::io;
use std::path::Path;

use hearth::text::GgufVocab;
use hearth_kernels::quant;
use hearth_models::ModelConfig;
use hearth_models::decoder::NamedTensor;
use hearth_models::weights::gguf_writer::GgufWriter;
use hearth_models::weights::{DType, Value};

/// Writes matrices as Q8_0 and vectors as F32.
pub fn write(
    path: &Path,
    config: &ModelConfig,
    vocab: &GgufVocab,
    tensors: &[NamedTensor],
) -> Result<(), Box<dyn std::error::Error>> {
    let mut writer = GgufWriter::new();
    put_config(&mut writer, config)?;
    put_vocab(&mut writer, vocab)?;
    let mut bodies = Vec::new();
    for named in tensors {
        let suffix = if named.bias { "bias" } else { "weight" };
        let shape = named.tensor.dims();
        let dtype = if shape.len() == 2 { DType::Q8_0 } else { DType::F32 };
        let values: Vec<f32> = named.tensor.flatten_all()?.to_vec1()?;
        let bytes = quant::quantize(dtype, &values).ok_or("Q8_0 cannot be written")?;
        writer.tensor(&named.role.name(true, suffix), shape, dtype)?;
        bodies.push(bytes);
    }
    let mut body = writer.write_header(Vec::new())?;
    bodies.iter().try_for_each(|bytes| body.write_tensor(bytes))?;
    let file = body.finish()?;
    // Nobody reads half a file.
    let part = path.with_extension("part");
    std::fs::write(&part, file)?;
    std::fs::rename(&part, path)?;
    Ok(())
}

fn put_config(writer: &mut GgufWriter, c: &ModelConfig) -> io::Result<()> {
    let arch = c.family;
    writer.put("general.architecture", Value::Str(arch))?;
    writer.put("general.name", Value::Str(super::NAME))?;
    writer.put("general.license", Value::Str("apache-2.0"))?;
    writer.put("general.file_type", Value::U32(7))?;
    writer.put("general.quantization_version", Value::U32(2))?;
    let numbers = [
        ("context_length", c.context_len),
        ("embedding_length", c.hidden_len),
        ("block_count", c.layer_count),
        ("feed_forward_length", c.ffn_len),
        ("attention.head_count", c.head_count),
        ("attention.head_count_kv", c.kv_head_count),
        ("attention.key_length", c.head_dim),
        ("attention.value_length", c.head_dim),
        ("vocab_size", c.vocab_len),
    ];
    for (key, number) in numbers {
        writer.put(&format!("{arch}.{key}"), Value::U32(number as u32))?;
    }
    writer.put(&format!("{arch}.rope.freq_base"), Value::F32(c.rope.base as f32))?;
    writer.put(&format!("{arch}.attention.layer_norm_rms_epsilon"), Value::F32(c.norm_eps))
}

fn put_vocab(writer: &mut GgufWriter, vocab: &GgufVocab) -> io::Result<()> {
    let texts = [("model", Some(&vocab.model)), ("pre", vocab.pre.as_ref())];
    for (key, text) in texts {
        if let Some(text) = text {
            writer.put(&format!("tokenizer.ggml.{key}"), Value::Str(text))?;
        }
    }
    writer.put_strings("tokenizer.ggml.tokens", &vocab.tokens)?;
    if let Some(types) = &vocab.token_types {
        writer.put_i32s("tokenizer.ggml.token_type", types)?;
    }
    if let Some(merges) = &vocab.merges {
        writer.put_strings("tokenizer.ggml.merges", merges)?;
    }
    let ids = [("eos", vocab.eos), ("padding", vocab.pad), ("eot", vocab.eot)];
    for (key, id) in ids {
        if let Some(id) = id {
            writer.put(&format!("tokenizer.ggml.{key}_token_id"), Value::U32(id))?;
        }
    }
    writer.put("tokenizer.ggml.add_bos_token", Value::Bool(vocab.add_bos == Some(true)))?;
    let template = vocab.chat_template.as_deref().unwrap_or_default();
    writer.put("tokenizer.chat_template", Value::Str(template))
}

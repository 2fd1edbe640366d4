//! What the files of a model say about it, for lists of models: nothing here is needed to serve it.

use std::fmt::Write as _;

use hearth_models::weights::{Format, Mix, Weights};
use hearth_models::{EncoderConfig, EncoderFile, ModelConfig, ModelFile};
use ring::digest::{Context, SHA256};

use crate::text::{ChatTemplate, Harmony, Tokenizer};

/// What is known of the files of a model.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Details {
    /// `gguf` or `safetensors`.
    pub format: String,
    /// The architecture: `qwen3`.
    pub family: String,
    /// Numbers in all tensors.
    pub parameters: u64,
    /// The mix of types that they are served in: `Q4_K_M`, `BF16`.
    pub quantization: String,
    /// Of all files.
    pub file_bytes: u64,
    /// SHA-256 in hexadecimal digits, over names, types and shapes of all tensors and the first
    /// bytes of some: it tells models apart, and is no checksum of the files.
    pub digest: String,
    /// The text of its chat template.
    pub template: Option<String>,
    /// Of its answers.
    pub skills: Skills,
    /// Sizes, by the names that GGUF has for them, without the architecture: `block_count`.
    pub sizes: Vec<(&'static str, u64)>,
}

/// What a model can be asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(
    clippy::struct_excessive_bools,
    reason = "independent of each other, each a word on a list"
)]
pub struct Skills {
    /// Text that goes on.
    pub completes: bool,
    /// Calls of tools.
    pub tools: bool,
    /// A thought before the answer.
    pub thinks: bool,
    /// What stands in a gap.
    pub inserts: bool,
    /// Vectors.
    pub embeds: bool,
}

/// Tensors whose first bytes are a part of the digest.
const SAMPLES: usize = 8;

impl Details {
    /// Of a model that generates text.
    pub(super) fn of_decoder(
        file: &ModelFile,
        tokenizer: &Tokenizer,
        template: Option<&ChatTemplate>,
        mix: Option<Mix>,
    ) -> Self {
        let ModelConfig { layer_count, head_count, kv_head_count, .. } = *file.config();
        let ModelConfig { family, hidden_len, ffn_len, context_len, vocab_len, .. } =
            *file.config();
        let sizes = [
            ("context_length", context_len),
            ("embedding_length", hidden_len),
            ("block_count", layer_count),
            ("feed_forward_length", ffn_len),
            ("attention.head_count", head_count),
            ("attention.head_count_kv", kv_head_count),
            ("vocab_size", vocab_len),
        ];
        let skills = Skills {
            completes: true,
            tools: template.is_some(),
            thinks: template.is_some_and(|template| {
                template.tags_thought() || Harmony::of(template, tokenizer).is_some()
            }),
            inserts: matches!(tokenizer.fill_in(&[], ""), Ok(Some(_))),
            embeds: false,
        };
        let template = template.map(|template| template.source().to_owned());
        Self { template, skills, ..Self::of(file.weights(), family, &sizes, mix) }
    }

    /// Of one that embeds.
    pub(super) fn of_encoder(file: &EncoderFile) -> Self {
        let EncoderConfig { family, hidden_len, ffn_len, layer_count, head_count, .. } =
            *file.config();
        let sizes = [
            ("context_length", file.config().context_len),
            ("embedding_length", hidden_len),
            ("block_count", layer_count),
            ("feed_forward_length", ffn_len),
            ("attention.head_count", head_count),
            ("vocab_size", file.config().vocab_len),
        ];
        let skills = Skills { embeds: true, ..Skills::default() };
        Self { skills, ..Self::of(file.weights(), family, &sizes, None) }
    }

    fn of(
        weights: &Weights,
        family: &str,
        sizes: &[(&'static str, usize)],
        mix: Option<Mix>,
    ) -> Self {
        let format = match weights.format() {
            Format::Gguf => "gguf",
            Format::SafeTensors => "safetensors",
        };
        let quantization = mix.or_else(|| mix_of(weights));
        let quantization =
            quantization.map_or_else(|| most_common_type(weights), |mix| mix.name().to_uppercase());
        Self {
            format: format.to_owned(),
            family: family.to_owned(),
            parameters: weights.numbers().map(|(_, _, numbers)| numbers).sum(),
            quantization,
            file_bytes: weights.file_bytes(),
            digest: digest(weights),
            template: None,
            skills: Skills::default(),
            sizes: sizes.iter().map(|&(name, size)| (name, size as u64)).collect(),
        }
    }
}

/// What a GGUF file calls itself.
fn mix_of(weights: &Weights) -> Option<Mix> {
    let number = weights.metadata()?.get_opt::<u32>("general.file_type").ok()??;
    Mix::of_file_type(number)
}

/// The type that most bytes are in.
fn most_common_type(weights: &Weights) -> String {
    let mut bytes = std::collections::BTreeMap::<&str, u64>::new();
    for (info, ty, _) in weights.numbers() {
        *bytes.entry(ty).or_default() += info.len_bytes() as u64;
    }
    let most = bytes.into_iter().max_by_key(|(_, bytes)| *bytes);
    most.map_or_else(String::new, |(name, _)| name.to_uppercase())
}

fn digest(weights: &Weights) -> String {
    let mut context = Context::new(&SHA256);
    let step = weights.len().div_ceil(SAMPLES).max(1);
    for (i, (name, info)) in weights.infos().enumerate() {
        context.update(format!("{name} {} {:?}\n", info.ty.name(), info.shape).as_bytes());
        if i % step == 0 {
            let bytes = weights.bytes(name);
            context.update(&bytes[..bytes.len().min(4096)]);
            weights.release(name); // a touch maps up to 2 MiB
        }
    }
    context.finish().as_ref().iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}"); // to memory, which never fails
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The one model that every build with its feature has.
    #[cfg(feature = "builtin-model")]
    #[test]
    fn the_files_of_a_model_say_what_it_is() {
        let file = crate::registry::builtin::open().unwrap().unwrap();
        let open = crate::registry::open(file).unwrap();
        let details = open.details(None);
        assert_eq!((details.format.as_str(), details.digest.len()), ("gguf", 64));
        assert_eq!(details.family, open.file().config().family);
        assert_eq!(details.file_bytes, open.file().weights().file_bytes());
        assert!(details.parameters > 100_000 && details.skills.tools && details.skills.completes);
        assert!(details.template.is_some_and(|text| text.contains("{%")));
        let served_in = open.details(Mix::named("q4_k_m")).quantization;
        assert_eq!((details.quantization.is_empty(), served_in.as_str()), (false, "Q4_K_M"));
    }

    /// Two numbers to a byte of codes, none to one of scales.
    #[test]
    fn codes_and_scales_apart_are_numbers_of_mxfp4() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens");
        let of = |name: &str| hearth_models::open(&folder.join(name)).unwrap();
        let (apart, together) = (of("gpt-oss-mxfp4"), of("gpt-oss-mxfp4.gguf"));
        let [apart, together] =
            [&apart, &together].map(|file| Details::of(file.weights(), "gpt_oss", &[], None));
        assert_eq!(apart.parameters, together.parameters);
        let file = of("gpt-oss-mxfp4");
        let types: Vec<&str> = file.weights().numbers().map(|(_, ty, _)| ty).collect();
        assert!(types.contains(&"MXFP4") && !types.contains(&"U8"), "{types:?}");
    }
}

//! The configuration and the page for people that a bundle carries.

use super::manifest::{MANIFEST, Manifest, Part};
use super::platform::Binary;

/// The configuration's name in the bundle.
pub(super) const CONFIG: &str = "hearth.toml";
/// The page for people. Plain text: a double click opens it everywhere.
pub(super) const README: &str = "README.txt";

/// What `hearth serve --config` reads; paths are relative to its folder.
pub(super) fn config(manifest: &Manifest) -> String {
    let list = |name: &str, values: Vec<String>| {
        let values: Vec<String> =
            values.into_iter().map(|value| toml::Value::String(value).to_string()).collect();
        format!("{name} = [{}]\n", values.join(", "))
    };
    let mut text =
        "# Read by `hearth serve --config`. Flags and HEARTH_* variables win over it.\n".to_owned();
    text += &list("model", manifest.models.iter().map(|m| format!("./{}", m.path)).collect());
    text += &list("alias", manifest.models.iter().map(|m| m.id.clone()).collect());
    text += "\n# To let other machines ask, choose a key and take the marks away:\n\
        # host = \"0.0.0.0\"\n# api-key = \"a word of your own\"\n# port = 8080\n";
    match (manifest.adapters.is_empty(), &manifest.models[..]) {
        (true, _) => {}
        (false, [_]) => text += "\nlora-dir = [\"./adapters\"]\n",
        (false, _) => {
            text += "\n# One of the models has the adapters: say which, and take the mark away:\n\
                # lora-dir = [\"MODEL=./adapters\"]\n";
        }
    }
    text
}

pub(super) fn readme(manifest: &Manifest, binaries: &[Binary]) -> String {
    let ids =
        |parts: &[Part]| parts.iter().map(|part| format!("  - {}\n", part.id)).collect::<String>();
    let scripts: Vec<(String, bool)> =
        binaries.iter().map(|b| (b.script().0, b.platform.starts_with("windows"))).collect();
    let start: String = match scripts.is_empty() {
        true => format!("  hearth serve --config {CONFIG}\n"),
        false => scripts
            .iter()
            .map(|(name, is_windows)| match is_windows {
                true => format!("  {name}\n"),
                false => format!("  sh {name}\n"),
            })
            .collect(),
    };
    let first = manifest.models.first().map_or("", |model| &model.id);
    include_str!("readme.txt")
        .replace("@MODELS@\n", &ids(&manifest.models))
        .replace("@START@\n", &start)
        .replace("@MODEL@", first)
        .replace("@MANIFEST@", MANIFEST)
        .replace("@CONFIG@", CONFIG)
        .replace("\r\n", "\n")
        .replace('\n', "\r\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::RawConfig;

    fn manifest() -> Manifest {
        let model = Part { id: "a \"b\"".into(), path: "models/a -b-/x.gguf".into() };
        Manifest::new(vec![model], vec![], vec![])
    }

    #[test]
    fn the_configuration_is_one_that_serve_reads() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join(CONFIG);
        std::fs::write(&file, config(&manifest())).unwrap();
        let raw = RawConfig::from_file(&file).unwrap();
        assert_eq!(raw.model.model, ["./models/a -b-/x.gguf"]);
        assert_eq!(raw.server.alias, ["a \"b\""]);
        assert!(raw.lora.lora_dir.is_empty());
        let adapter = Part { id: "x".into(), path: "adapters/x".into() };
        let one = Manifest { adapters: vec![adapter], ..manifest() };
        std::fs::write(&file, config(&one)).unwrap();
        assert_eq!(RawConfig::from_file(&file).unwrap().lora.lora_dir, ["./adapters"]);
        let models = [manifest().models, manifest().models].concat();
        let several = config(&Manifest { models, ..one });
        assert!(several.contains("# lora-dir = [\"MODEL=./adapters\"]"), "{several}");
        // The lines to take the marks from are lines that it would read.
        std::fs::write(&file, config(&manifest()).replace("# ", "").replacen("Read", "#", 1))
            .unwrap();
        let text = std::fs::read_to_string(&file).unwrap();
        let settings: String =
            text.lines().filter(|line| line.contains(" = ")).map(|l| format!("{l}\n")).collect();
        std::fs::write(&file, settings).unwrap();
        assert_eq!(RawConfig::from_file(&file).unwrap().server.host.unwrap(), "0.0.0.0");
    }

    #[test]
    fn the_page_names_what_there_is() {
        let binaries = ["linux-x86_64", "windows-x86_64"]
            .map(|platform| Binary { platform, path: Default::default() });
        let text = readme(&manifest(), &binaries);
        for word in ["sh start-linux-x86_64.sh", "start-windows-x86_64.cmd", "a \"b\"", "繁體"] {
            assert!(text.contains(word), "{word}: {text}");
        }
        assert!(!text.contains('@') && text.matches('\n').count() == text.matches("\r\n").count());
        assert!(readme(&manifest(), &[]).contains("hearth serve --config hearth.toml"));
    }
}

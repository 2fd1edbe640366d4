//! Files that come back as they were, files that must not, and folders that cannot be used.

use super::*;
use crate::kv::Chain;
use crate::types::CacheScope;

const PAYLOAD: usize = 5000;

/// What happens to the bytes of a file.
type Damage = dyn Fn(&mut Vec<u8>);

fn model(content: u8) -> ModelKey {
    ModelKey::new(Digest([content; 32]), "layout", "realm")
}

fn label(model: ModelKey, depth: usize, text: &[u32]) -> Label<'_> {
    let root = model.root(CacheScope::default(), None);
    let before = (0..depth as u32).fold(Chain::START, |chain, token| chain.then(&[token]));
    Label { model, root, before, depth, text }
}

fn payload(seed: u8) -> Vec<u8> {
    (0..PAYLOAD).map(|i| (i as u8).wrapping_mul(seed)).collect()
}

fn open(folder: &Path, bytes_max: u64) -> Shelf {
    Shelf::open(folder, bytes_max, "realm".into()).unwrap()
}

impl Shelf {
    /// So many seconds pass.
    fn later(&mut self, seconds: u64) {
        self.opened.1 += seconds * 1_000_000;
    }
}

/// Every file of blocks.
fn files(folder: &Path) -> Vec<PathBuf> {
    let models = fs::read_dir(folder.join(FOLDER)).unwrap().map(|m| m.unwrap().path());
    let inside = models.filter(|m| m.is_dir()).flat_map(|m| fs::read_dir(m).unwrap());
    inside.map(|file| file.unwrap().path()).collect()
}

#[test]
fn what_was_put_is_taken_again_also_by_the_next_process() {
    let folder = tempfile::tempdir().unwrap();
    let shelf = open(folder.path(), 1 << 20);
    let (one, two) = (label(model(1), 0, &[7; 16]), label(model(1), 3, &[7; 16]));
    assert_eq!(shelf.take(&one, PAYLOAD), Err(Miss::Absent));
    assert_eq!(shelf.put(&one, &payload(3), true), Put::Written);
    assert_eq!(shelf.put(&two, &payload(5), true), Put::Written);
    assert_eq!(shelf.put(&one, &payload(3), true), Put::Known);
    assert_eq!(shelf.take(&two, PAYLOAD), Ok(payload(5)));
    let taken = Shelf::open(folder.path(), 1 << 20, String::new()).unwrap_err();
    assert!(matches!(taken, ShelfError::Taken(_)), "{taken}");
    shelf.index().check();
    drop(shelf);
    let shelf = open(folder.path(), 1 << 20);
    shelf.index().check();
    assert_eq!(shelf.take(&one, PAYLOAD), Ok(payload(3)));
    assert_eq!(shelf.take(&two, PAYLOAD), Ok(payload(5)));
    assert_eq!(shelf.bytes_of(model(1)).load(Ordering::Relaxed), 2 * 8192);
}

#[test]
fn everything_that_makes_the_numbers_is_part_of_the_name() {
    let key = |content, layout, realm| ModelKey::new(Digest([content; 32]), layout, realm);
    let base = key(1, "f16", "a");
    let scope = |tenant| CacheScope { adapter: 9, tenant };
    let name = |model: ModelKey, tenant, adapter: Option<u8>, text: &[u32]| {
        let root = model.root(scope(tenant), adapter.map(|a| Digest([a; 32])));
        Name::new(model, root, Chain::START.then(text))
    };
    let mut names = vec![
        name(base, 1, None, &[1, 2]),
        name(key(2, "f16", "a"), 1, None, &[1, 2]),
        name(key(1, "q8_0", "a"), 1, None, &[1, 2]),
        name(key(1, "f16", "b"), 1, None, &[1, 2]),
        name(base, 2, None, &[1, 2]),
        name(base, 1, Some(1), &[1, 2]),
        name(base, 1, Some(2), &[1, 2]),
        name(base, 1, None, &[1, 3]),
    ];
    let count = names.len();
    names.sort();
    names.dedup();
    assert_eq!(names.len(), count);
}

/// Long parts are hashed side by side; every byte of them counts, and its place.
#[test]
fn every_byte_of_a_long_part_counts() {
    let of = |bytes: &[u8]| Digest::of_parts(&[bytes]);
    let mut bytes: Vec<u8> = (0..(5 << 20) + 7).map(|i: usize| (i >> 8) as u8).collect();
    let mut all = vec![of(&bytes), of(&bytes[..5 << 20]), of(&bytes[..1 << 20]), of(&bytes[7..])];
    for at in [0, (1 << 20) - 1, 1 << 20, 3 << 20, bytes.len() - 1] {
        bytes[at] ^= 1;
        all.push(of(&bytes));
        bytes[at] ^= 1;
    }
    bytes.rotate_left(1 << 20);
    all.push(of(&bytes));
    bytes.rotate_right(1 << 20);
    assert_eq!(of(&bytes), all[0]);
    let count = all.len();
    all.sort();
    all.dedup();
    assert_eq!(all.len(), count);
}

/// A flip of any byte, a missing end, more behind it, and the file of another block.
#[test]
fn a_damaged_or_foreign_file_is_removed_and_never_given_out() {
    let folder = tempfile::tempdir().unwrap();
    let shelf = open(folder.path(), 1 << 20);
    let right = label(model(1), 2, &[7; 16]);
    let damage: [&Damage; 8] = [
        // What a power cut leaves of a file that was not flushed.
        &|file| file.fill(0),
        &|file| file[4096..].fill(0),
        &|file| file.truncate(file.len() - 1),
        &|file| file.push(0),
        &|file| file.clear(),
        &|file| file.truncate(100),
        &|file| file[..8].copy_from_slice(b"NOTHEARD"),
        &|file| file[124] ^= 1, // a token id
    ];
    let path = shelf.path(&right.name());
    let broken = |bytes: Vec<u8>| {
        fs::write(&path, bytes).unwrap();
        assert_eq!(shelf.take(&right, PAYLOAD), Err(Miss::Corrupt));
        assert!(!path.exists() && !shelf.has(&right.name()));
    };
    for damage in damage {
        assert_eq!(shelf.put(&right, &payload(3), true), Put::Written);
        let mut bytes = fs::read(&path).unwrap();
        damage(&mut bytes);
        broken(bytes);
    }
    assert_eq!(shelf.put(&right, &payload(3), true), Put::Written);
    let bytes = fs::read(&path).unwrap();
    for at in (0..bytes.len()).step_by(61) {
        let mut flipped = bytes.clone();
        flipped[at] ^= 0x10;
        broken(flipped);
        shelf.put(&right, &payload(3), true);
    }
    // Another text, another depth, another model: a name that two blocks had would not help.
    let text = [8; 16];
    for other in
        [label(model(1), 2, &text), label(model(1), 3, &[7; 16]), label(model(2), 2, &text)]
    {
        shelf.put(&other, &payload(4), true);
        let bytes = fs::read(shelf.path(&other.name())).unwrap();
        shelf.put(&right, &payload(3), true);
        broken(bytes);
    }
    shelf.index().check();
}

#[test]
fn the_size_holds_and_the_end_of_a_text_goes_first() {
    let folder = tempfile::tempdir().unwrap();
    let mut shelf = open(folder.path(), 4 * 8192);
    // So far apart that a slow disk turns no order round.
    let blocks = [0, 1000, 2000, 3000].map(|depth| label(model(1), depth, &[7; 16]));
    blocks
        .iter()
        .rev()
        .for_each(|block| assert_eq!(shelf.put(block, &payload(3), true), Put::Written));
    let other = label(model(2), 0, &[9; 16]);
    let has = |shelf: &Shelf| blocks.iter().map(|b| shelf.has(&b.name())).collect::<Vec<_>>();
    shelf.put(&other, &payload(3), true);
    assert_eq!(has(&shelf), [true, true, true, false]);
    assert_eq!(shelf.put(&blocks[3], &payload(3), true), Put::Dropped, "no part of its beginning");
    shelf.later(30);
    blocks[..2].iter().for_each(|block| drop(shelf.take(block, PAYLOAD)));
    shelf.put(&blocks[3], &payload(3), true);
    assert_eq!((has(&shelf), shelf.has(&other.name())), (vec![true, true, false, true], true));
    shelf.index().check();
    drop(shelf);
    // A smaller shelf keeps what was used last, by the times of the files.
    let shelf = open(folder.path(), 2 * 8192);
    assert_eq!((files(folder.path()).len(), has(&shelf)[0]), (2, true));
    assert_eq!(shelf.put(&label(model(1), 9, &[1]), &[0; 20_000], true), Put::Dropped, "too large");
}

/// A thousand questions of one student each do not make a chapter leave that two have read.
#[test]
fn what_one_used_comes_into_the_middle_of_the_line() {
    let folder = tempfile::tempdir().unwrap();
    let mut shelf = open(folder.path(), 10 * 8192);
    let texts: Vec<[u32; 16]> = (0..40).map(|token| [token; 16]).collect();
    let text = |i: usize| label(model(1), 0, &texts[i]);
    let put = |shelf: &Shelf, range: std::ops::Range<usize>, shared| {
        range.for_each(|i| assert_eq!(shelf.put(&text(i), &payload(3), shared), Put::Written));
    };
    put(&shelf, 0..5, false);
    shelf.later(400);
    let has = |range: std::ops::Range<usize>| range.filter(|&i| shelf.has(&text(i).name())).count();
    put(&shelf, 5..10, true);
    put(&shelf, 10..20, false);
    assert_eq!((has(0..5), has(5..10), has(10..20)), (0, 5, 5));
    put(&shelf, 20..30, true);
    assert_eq!(has(20..30), 10, "and nothing stays for ever");
    let newest_us = shelf.index().newest_us();
    (20..30).for_each(|i| assert!(shelf.index().touch(&text(i).name(), 0).is_some()));
    assert_eq!(shelf.index().newest_us(), newest_us, "no use makes a block older");
    shelf.index().check();
}

/// What memory answers is of use too, and the next process has to know it.
#[test]
fn a_file_is_told_of_uses_that_nobody_read_it_for() {
    let folder = tempfile::tempdir().unwrap();
    let shelf = open(folder.path(), 1 << 20);
    let block = label(model(1), 0, &[7; 16]);
    let (name, hour) = (block.name(), Duration::from_secs(3600));
    shelf.put(&block, &payload(3), true);
    let path = shelf.path(&name);
    let old = SystemTime::now() - hour;
    File::options().write(true).open(&path).unwrap().set_modified(old).unwrap();
    drop(shelf);
    let shelf = open(folder.path(), 1 << 20);
    assert_eq!(shelf.touch(&name, 0, true), Found::Stale);
    shelf.tell(&name);
    assert_eq!(shelf.touch(&name, 0, true), Found::Yes);
    let told = fs::metadata(&path).unwrap().modified().unwrap();
    assert!(told > old + hour / 2, "{told:?}");
    shelf.flush(&[name, label(model(1), 5, &[8; 16]).name()]);
    assert_eq!(shelf.take(&block, PAYLOAD), Ok(payload(3)));
    shelf.index().check();
}

/// What is used now is newer than what a clock that was ahead left behind.
#[test]
fn a_clock_that_was_set_back_turns_no_order_round() {
    let folder = tempfile::tempdir().unwrap();
    let [old, one, two] = [7, 8, 9].map(|token| [token; 16]);
    let [old, one, two] = [&old, &one, &two].map(|text| label(model(1), 0, text));
    let shelf = open(folder.path(), 2 * 8192);
    shelf.put(&old, &payload(3), true);
    let file = File::options().write(true).open(shelf.path(&old.name())).unwrap();
    file.set_modified(SystemTime::now() + Duration::from_secs(86_400)).unwrap();
    drop(shelf);
    let shelf = open(folder.path(), 2 * 8192);
    shelf.put(&one, &payload(3), true);
    shelf.put(&two, &payload(3), true);
    assert_eq!([&old, &one, &two].map(|block| shelf.has(&block.name())), [false, true, true]);
}

#[test]
fn what_is_not_ours_stays_and_what_was_not_finished_goes() {
    let folder = tempfile::tempdir().unwrap();
    let inner = folder.path().join(FOLDER).join("0123456789abcdef");
    fs::create_dir_all(&inner).unwrap();
    let (notes, half) = (inner.join("notes.kv"), inner.join("a1".repeat(32) + ".7.tmp"));
    let outside = folder.path().join("thesis.kv");
    [&notes, &half, &outside].into_iter().for_each(|path| fs::write(path, "mine").unwrap());
    let shelf = open(folder.path(), 8192);
    assert!(notes.exists() && outside.exists() && !half.exists());
    shelf.put(&label(model(1), 0, &[7; 16]), &payload(3), true);
    shelf.put(&label(model(1), 1, &[7; 16]), &payload(3), true);
    assert!(notes.exists() && outside.exists());
}

/// A file in the place of a model's folder: the system refuses, whoever asks.
#[test]
fn a_folder_that_cannot_be_written_makes_a_pause_and_no_more() {
    let folder = tempfile::tempdir().unwrap();
    let mut shelf = open(folder.path(), 1 << 20);
    shelf.pause = Duration::from_millis(50);
    let block = label(model(1), 0, &[7; 16]);
    let place = shelf.path(&block.name()).parent().unwrap().to_owned();
    fs::write(&place, "in the way").unwrap();
    assert_eq!(shelf.put(&block, &payload(3), true), Put::Failed);
    assert_eq!(shelf.put(&block, &payload(3), true), Put::Dropped);
    fs::remove_file(place).unwrap();
    std::thread::sleep(shelf.pause);
    assert_eq!(shelf.put(&block, &payload(3), true), Put::Written);
    assert!(Shelf::open(Path::new("/dev/null/x"), 1, String::new()).is_err());
}

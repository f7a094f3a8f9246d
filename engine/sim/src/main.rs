//! tmp
fn main() {
    let args: Vec<u64> = std::env::args().skip(1).filter_map(|a| a.parse().ok()).collect();
    let verbose = std::env::args().any(|a| a == "-v");
    let (from, to) = if args.len() == 1 { (args[0], args[0] + 1) } else { (args[0], args[1]) };
    let mut endings = std::collections::BTreeMap::new();
    for seed in from..to {
        let r = pageferry_sim::run_seed(seed, verbose);
        *endings.entry(r.ending).or_insert(0) += 1;
        if let Some(v) = &r.violation {
            println!("seed {seed}: {v} faults {:?}", r.faults);
        }
    }
    println!("{endings:?}");
}

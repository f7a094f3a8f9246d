//! What must be right whatever the machine: `--test`.

use crate::BenchError;
use crate::study::{End, Engine, Proof, Run, Study};

/// Fails at the first wrong answer.
pub(super) fn check(study: &Study) -> Result<(), BenchError> {
    let wrong = |run: &Run, what: &str| {
        let Run { link, guest, mover, turn, .. } = run;
        Err(BenchError::Wrong(format!("{link} {guest} {mover}, turn {turn}: {what}: {run:?}")))
    };
    for run in &study.runs {
        let facts = study.guests.iter().find(|guest| guest.name == run.guest);
        let (Some(guest), Some(mover)) = (facts, study.movers.iter().find(|mover| mover.name == run.mover)) else {
            return wrong(run, "nobody knows this guest or this mover");
        };
        if run.end != End::Completed {
            return wrong(run, "it did not arrive");
        }
        let ours = mover.engine == Engine::Pageferry;
        if ours && !run.verified.contains(&Proof::Digest) {
            return wrong(run, "the digests of both sides were not compared");
        }
        if guest.runs && !run.verified.contains(&Proof::GuestCheck) {
            return wrong(run, "the guest did not check its memory");
        }
        if guest.runs && (run.stalls.before_ms.is_none() || run.stalls.during_ms.is_none()) {
            return wrong(run, "the guest does not tell its stalls");
        }
        let bytes = |name: &str| run.stages.iter().filter(|stage| stage.name == name).map(|stage| stage.bytes).sum();
        let (all, sent): (u64, u64) = (run.stages.iter().map(|stage| stage.bytes).sum(), bytes("sent"));
        // Pages of zeros may never have been touched: nobody looks at those that the host has not even made.
        if ours && all < guest.bytes / 10 * 7 {
            return wrong(run, "less was looked at than has content");
        }
        if ours && (sent == 0 || sent > run.wire_bytes) {
            return wrong(run, "more was sent than was on the wire");
        }
        if run.remaining.iter().any(|point| point.bytes > guest.bytes) && ours {
            return wrong(run, "more was left than there is");
        }
        if ours && run.remaining.first().is_none_or(|point| point.bytes != guest.bytes) {
            return wrong(run, "it does not begin with all of the memory");
        }
    }
    for link in &study.links {
        let faster = |goodput: &f64| link.bits_per_second.is_some_and(|bits| *goodput * 8.0 > bits as f64 * 1.05);
        if link.goodputs.is_empty() || link.goodputs.iter().any(faster) {
            return Err(BenchError::Wrong(format!("{}: a plain copy is faster than the link: {link:?}", link.name)));
        }
    }
    Ok(())
}

/// Fails if nothing was measured because every migration failed.
pub(super) fn check_any(study: &Study) -> Result<(), BenchError> {
    let failures = study.runs.iter().map(|run| if let End::Failed(why) = &run.end { Some(why) } else { None });
    match failures.collect::<Option<Vec<_>>>().as_deref() {
        Some([first, ..]) => Err(BenchError::Tool(format!("every migration failed; the first: {first}"))),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::example;

    #[test]
    fn a_study_in_which_everything_failed_is_no_measurement() {
        let mut study = example::small(&[30.0, 31.0]);
        study.runs[0].end = End::Failed("no peer".to_owned());
        assert!(check_any(&study).is_ok() && check_any(&example::nothing()).is_ok());
        study.runs[1].end = End::Failed("no peer either".to_owned());
        assert!(check_any(&study).unwrap_err().to_string().contains("no peer"));
    }

    #[test]
    fn what_does_not_add_up_is_found() {
        let mut right = example::small(&[30.0]);
        let bytes = right.guests[0].bytes;
        for run in &mut right.runs {
            run.verified = vec![Proof::Digest, Proof::GuestCheck];
            run.stalls.before_ms = Some(1.0);
            run.stalls.during_ms = Some(1.0);
            run.remaining[0].bytes = bytes;
            // What rounding took from the example.
            run.stages[0].bytes += bytes - run.stages.iter().map(|stage| stage.bytes).sum::<u64>().min(bytes);
        }
        check(&right).unwrap();
        let wrongs: [fn(&mut Study); 6] = [
            |study| study.runs[0].end = End::GivenUp,
            |study| study.runs[0].verified = vec![Proof::Digest, Proof::Alive],
            |study| study.runs[0].verified = vec![Proof::GuestCheck],
            |study| study.runs[0].stages.truncate(1),
            |study| study.runs[0].wire_bytes = 1,
            |study| study.links[0].goodputs = vec![1e12],
        ];
        for (index, wrong) in wrongs.into_iter().enumerate() {
            let mut study = right.clone();
            wrong(&mut study);
            assert!(check(&study).is_err(), "{index}");
        }
    }
}

//! Which page of a request was touched.
//!
//! Of a fault in a mapping the kernel makes a request for the pages around it: as many as
//! it reads ahead, the page that was touched in the middle (`do_sync_mmap_readahead` of
//! Linux's mm/filemap.c). Pages that it has already divide it into several requests. So a
//! page is what was touched if, with it in the middle, just what was requested was missing.
//! Where no page fits, or the request goes on where the last one ended, as those of a
//! reader do who goes through a file in order, all of it counts as touched.

use std::ops::Range;

/// The pages of a request that may be what was touched. `ahead` is how many pages the
/// kernel reads around a fault, `pages` how many the file has.
pub(crate) fn touched(
    request: &Range<u64>,
    last_end: Option<u64>,
    ahead: u64,
    pages: u64,
    is_given: impl Fn(u64) -> bool,
) -> Vec<u64> {
    let len = request.end - request.start;
    if ahead <= 1 || len > ahead || last_end == Some(request.start) {
        return request.clone().collect();
    }
    let fits = |page: &u64| {
        let first = page.saturating_sub(ahead / 2);
        let end = (first + ahead).min(pages);
        first <= request.start
            && request.end <= end
            && (first..request.start).all(&is_given)
            && (request.end..end).all(&is_given)
    };
    let fitting: Vec<u64> = request.clone().filter(fits).collect();
    if fitting.is_empty() {
        return request.clone().collect();
    }
    fitting
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(request: Range<u64>, given: &[u64]) -> Vec<u64> {
        touched(&request, None, 4, 1000, |page| given.contains(&page))
    }

    #[test]
    fn the_middle_of_a_whole_request_was_touched() {
        assert_eq!(of(100..104, &[]), [102]);
        assert_eq!(touched(&(100..132), None, 32, 1000, |_| false), [116]);
    }

    #[test]
    fn at_the_ends_of_a_file_it_may_be_several() {
        assert_eq!(of(0..4, &[]), [0, 1, 2]);
        assert_eq!(of(996..1000, &[]), [998]);
        assert_eq!(of(997..1000, &[]), [999]);
    }

    #[test]
    fn what_the_kernel_has_already_is_left_out_of_a_request() {
        // 100 is there; 101 to 103 were missing around 102.
        assert_eq!(of(101..104, &[100]), [102]);
        // 103 is there.
        assert_eq!(of(100..103, &[103]), [102]);
        // Both could be: with 100 and 101 there, or 104 and 105.
        assert_eq!(of(102..104, &[100, 101, 104, 105]), [102, 103]);
    }

    #[test]
    fn what_is_read_in_order_or_at_once_was_all_touched() {
        assert_eq!(
            touched(&(8..12), Some(8), 4, 1000, |_| false),
            [8, 9, 10, 11]
        );
        assert_eq!(of(8..16, &[]), (8..16).collect::<Vec<_>>());
        assert_eq!(touched(&(8..9), None, 1, 1000, |_| false), [8]);
        // No fault makes such a request.
        assert_eq!(of(8..9, &[]), [8]);
    }
}

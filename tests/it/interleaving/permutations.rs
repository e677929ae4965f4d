//! The orders in which the steps of several sessions can be run, each session in its own order.

/// All orders of `counts[s]` steps for each session `s`, by session number; an evenly spread choice of `limit` of them
/// where there are more. The same every time.
pub(crate) fn spread(counts: &[usize], limit: u64) -> impl Iterator<Item = Vec<usize>> {
    let total = total(counts);
    let chosen = total.min(limit);
    (0..chosen).map(move |index| nth(counts, index * total / chosen))
}

/// How many orders there are: the multinomial coefficient.
pub(crate) fn total(counts: &[usize]) -> u64 {
    let mut total = 1;
    let mut placed = 0;
    for &count in counts {
        for nth in 1..=count as u64 {
            placed += 1;
            total = total * placed / nth;
        }
    }
    total
}

/// The order of that index, in lexicographic order.
fn nth(counts: &[usize], mut index: u64) -> Vec<usize> {
    let mut left = counts.to_vec();
    let mut order = Vec::new();
    while left.iter().any(|&count| count > 0) {
        for session in 0..left.len() {
            if left[session] == 0 {
                continue;
            }
            left[session] -= 1;
            let below = total(&left);
            if index < below {
                order.push(session);
                break;
            }
            index -= below;
            left[session] += 1;
        }
    }
    order
}

#[test]
fn every_order_comes_once() {
    let mut orders: Vec<Vec<usize>> = spread(&[2, 1, 3], 1000).collect();
    assert_eq!(orders.len() as u64, total(&[2, 1, 3]));
    assert_eq!(orders.len(), 60);
    assert!(orders.is_sorted());
    orders.dedup();
    assert_eq!(orders.len(), 60);
    assert_eq!(orders[0], [0, 0, 1, 2, 2, 2]);
    assert_eq!(spread(&[2, 1, 3], 7).count(), 7);
}

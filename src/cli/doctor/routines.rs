//! The functions and views of this program, as their text has them.

use crate::Schema;

/// A function or a view.
pub(super) struct Routine {
    pub(super) name: &'static str,
    pub(super) what: What,
}

pub(super) enum What {
    Function {
        /// Its text between the dollars; nothing where it is a single expression, of which PostgreSQL keeps no text.
        body: Option<String>,
        is_definer: bool,
        /// In lower case: PostgreSQL writes the names of some in its own way.
        settings: Vec<String>,
    },
    View {
        query: &'static str,
    },
}

/// All of them that a text defines.
pub(super) fn defined(text: &'static str, schema: &Schema) -> Vec<Routine> {
    text.split("\ncreate or replace ").skip(1).filter_map(|definition| routine(definition, schema)).collect()
}

/// Each is followed by its comment.
fn routine(definition: &'static str, schema: &Schema) -> Option<Routine> {
    let definition = definition.split("\ncomment on ").next()?;
    if let Some(view) = definition.strip_prefix("view pgonce.") {
        let (name, query) = view.split_once(" as\n")?;
        return Some(Routine { name, what: What::View { query: query.trim_end().trim_end_matches(';') } });
    }
    let function = definition.strip_prefix("function pgonce.")?;
    let (name, rest) = function.split_once('(')?;
    let mut parts = rest.split("$$");
    let header = parts.next()?;
    let body = parts.next().map(|body| schema.sql(body));
    let settings = header.lines().filter_map(|line| line.split_once(' '));
    let settings = settings.filter(|(verb, _)| *verb == "set").map(|(_, setting)| setting);
    let settings = settings.map(|setting| setting.replacen(" = ", "=", 1).replace('\'', "").to_lowercase());
    let is_definer = header.lines().any(|line| line.contains(" security definer"));
    Some(Routine { name, what: What::Function { body, is_definer, settings: settings.collect() } })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migrate::ROUTINES;

    #[test]
    fn all_functions_and_views_are_read_whole() {
        let lines = ROUTINES.iter().flat_map(|text| text.lines());
        let defined_lines = lines.filter(|line| line.starts_with("create")).count();
        let all: Vec<Routine> = ROUTINES.iter().flat_map(|text| defined(text, &Schema::default())).collect();
        assert_eq!(all.len(), defined_lines);
        let bodies = ROUTINES.iter().map(|text| text.matches("\nas $$").count()).sum::<usize>();
        let has_body = |routine: &&Routine| matches!(&routine.what, What::Function { body: Some(_), .. });
        assert_eq!(all.iter().filter(has_body).count(), bodies);
    }
}

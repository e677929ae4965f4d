//! The functions and views of this program, as their text has them.

use tokio_postgres::Row;

use crate::Schema;

/// A function or a view.
pub(super) struct Routine {
    pub(super) name: &'static str,
    pub(super) what: What,
}

pub(super) enum What {
    Function { manner: Manner, body: Body },
    View { query: &'static str },
}

/// How a function is called.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Manner {
    language: String,
    volatility: String,
    is_strict: bool,
    is_parallel_safe: bool,
    is_definer: bool,
    /// In lower case: PostgreSQL writes the names of some in its own way.
    settings: Vec<String>,
}

/// What a function does.
pub(super) enum Body {
    /// Text between dollars, which PostgreSQL keeps as it is.
    Kept(String),
    /// A single expression or statement, of which it keeps no text.
    Inlined {
        /// Names and types.
        arguments: Vec<(&'static str, &'static str)>,
        expression: Expression,
    },
}

pub(super) enum Expression {
    Value(&'static str),
    Rows(&'static str),
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
        return Some(Routine { name, what: What::View { query: without_end(query) } });
    }
    let function = definition.strip_prefix("function pgonce.")?;
    let (name, rest) = function.split_once('(')?;
    let (arguments, rest) = rest.split_once(")\n")?;
    let mut parts = rest.split("$$");
    let header = parts.next()?;
    let body = if let Some(text) = parts.next() {
        Body::Kept(schema.sql(text))
    } else {
        let expression = match header.split_once("\nreturn ") {
            Some((_, value)) => Expression::Value(without_end(value)),
            None => Expression::Rows(without_end(
                without_end(header.split_once("\nbegin atomic\n")?.1).strip_suffix("end")?,
            )),
        };
        Body::Inlined { arguments: arguments.split(',').filter_map(argument).collect(), expression }
    };
    Some(Routine { name, what: What::Function { manner: Manner::written(header)?, body } })
}

fn without_end(statement: &str) -> &str {
    statement.trim_end().trim_end_matches(';')
}

/// The name and the type of an argument.
fn argument(text: &'static str) -> Option<(&'static str, &'static str)> {
    let declared = text.split(" default ").next()?;
    declared.trim().split_once(' ')
}

impl Manner {
    /// As the lines say that follow the result of a function.
    fn written(header: &str) -> Option<Self> {
        let words: Vec<&str> = header.lines().find(|line| line.starts_with("language "))?.split(' ').collect();
        let has = |word: &str| words.contains(&word);
        let settings = header.lines().filter_map(|line| line.split_once(' '));
        let settings = settings.filter(|(verb, _)| *verb == "set").map(|(_, setting)| setting);
        let settings = settings.map(|setting| setting.replacen(" = ", "=", 1).replace('\'', ""));
        Some(Self {
            language: (*words.get(1)?).to_owned(),
            volatility: (*words.get(2)?).to_owned(),
            is_strict: has("strict"),
            is_parallel_safe: has("parallel"),
            is_definer: has("definer"),
            settings: in_order(settings),
        })
    }

    /// As a row of `sql/doctor/routines.sql` says.
    pub(super) fn found(row: &Row) -> Result<Self, tokio_postgres::Error> {
        Ok(Self {
            language: row.try_get("language")?,
            volatility: row.try_get("volatility")?,
            is_strict: row.try_get("is_strict")?,
            is_parallel_safe: row.try_get("is_parallel_safe")?,
            is_definer: row.try_get("is_definer")?,
            settings: in_order(row.try_get::<_, Vec<String>>("settings")?.into_iter()),
        })
    }
}

fn in_order(settings: impl Iterator<Item = String>) -> Vec<String> {
    let mut settings: Vec<String> = settings.map(|setting| setting.to_lowercase()).collect();
    settings.sort();
    settings
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
        let has_text = |routine: &&Routine| matches!(&routine.what, What::Function { body: Body::Kept(_), .. });
        assert_eq!(all.iter().filter(has_text).count(), bodies);
    }
}

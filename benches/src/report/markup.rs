//! A tree of elements that can only be written well-formed: HTML and SVG alike.

use std::fmt::{self, Display, Write};

/// Elements of HTML that have no end tag.
const VOID: [&str; 4] = ["meta", "br", "col", "hr"];

/// An element with what is in it.
#[derive(Clone, Debug)]
pub(crate) struct Element {
    name: &'static str,
    attributes: Vec<(&'static str, String)>,
    children: Vec<Node>,
}

#[derive(Clone, Debug)]
enum Node {
    Element(Element),
    Text(String),
}

impl Element {
    pub(crate) fn new(name: &'static str) -> Self {
        Self { name, attributes: Vec::new(), children: Vec::new() }
    }

    /// Sets an attribute, in place of what it was.
    pub(crate) fn with(mut self, name: &'static str, value: impl Display) -> Self {
        self.attributes.retain(|(set, _)| *set != name);
        self.attributes.push((name, value.to_string()));
        self
    }

    pub(crate) fn class(self, names: impl Display) -> Self {
        self.with("class", names)
    }

    /// A coordinate or a length in SVG's units: a tenth of a pixel is as fine as anybody sees.
    pub(crate) fn at(self, name: &'static str, value: f64) -> Self {
        self.with(name, number(value))
    }

    pub(crate) fn has_class(&self, class: &str) -> bool {
        let classes = self.attributes.iter().filter(|(name, _)| *name == "class");
        classes.into_iter().any(|(_, set)| set.split(' ').any(|found| found == class))
    }

    pub(crate) fn text(mut self, text: impl Into<String>) -> Self {
        self.children.push(Node::Text(text.into()));
        self
    }

    pub(crate) fn push(mut self, child: Element) -> Self {
        self.children.push(Node::Element(child));
        self
    }

    pub(crate) fn extend(mut self, children: impl IntoIterator<Item = Element>) -> Self {
        self.children.extend(children.into_iter().map(Node::Element));
        self
    }

    fn write(&self, out: &mut impl Write) -> fmt::Result {
        write!(out, "<{}", self.name)?;
        for (name, value) in &self.attributes {
            write!(out, " {name}=\"")?;
            escape(value, out)?;
            out.write_char('"')?;
        }
        if VOID.contains(&self.name) {
            return out.write_str("/>");
        }
        out.write_char('>')?;
        for child in &self.children {
            match child {
                Node::Element(element) => element.write(out)?,
                Node::Text(text) if self.name == "style" => out.write_str(text)?,
                Node::Text(text) => escape(text, out)?,
            }
        }
        write!(out, "</{}>", self.name)?;
        // A line for each block keeps kept pages comparable with line-wise tools.
        if matches!(self.name, "g" | "svg" | "tr" | "p" | "section" | "figure" | "li") {
            out.write_char('\n')
        } else {
            Ok(())
        }
    }
}

impl Display for Element {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.write(f)
    }
}

/// A number as short as a tenth allows.
pub(crate) fn number(value: f64) -> String {
    let text = format!("{value:.1}");
    text.strip_suffix(".0").map_or_else(|| text.clone(), str::to_owned)
}

fn escape(text: &str, out: &mut impl Write) -> fmt::Result {
    for letter in text.chars() {
        match letter {
            '&' => out.write_str("&amp;")?,
            '<' => out.write_str("&lt;")?,
            '>' => out.write_str("&gt;")?,
            '"' => out.write_str("&quot;")?,
            // Neither HTML nor XML has a place for these.
            control if control.is_control() && !matches!(control, '\n' | '\t') => out.write_char('\u{fffd}')?,
            other => out.write_char(other)?,
        }
    }
    Ok(())
}

/// Whether every element that is opened is closed, in order. Attributes may hold anything but `<`, `>` and `"`.
#[cfg(test)]
pub(crate) fn balanced(page: &str) -> Result<(), String> {
    let mut open: Vec<&str> = Vec::new();
    for part in page.split('<').skip(1) {
        let (tag, text) = part.split_once('>').ok_or_else(|| format!("no end of tag in {part:?}"))?;
        if text.contains('>') && open.last() != Some(&"style") {
            return Err(format!("a bare > in {text:?}"));
        }
        if tag.starts_with('!') || tag.ends_with('/') {
            continue;
        }
        if tag.matches('"').count() % 2 == 1 {
            return Err(format!("quotes of <{tag}>"));
        }
        match tag.strip_prefix('/') {
            Some(name) if open.last() == Some(&name) => drop(open.pop()),
            Some(name) => return Err(format!("</{name}> closes {:?}", open.last())),
            None => open.push(tag.split_whitespace().next().unwrap_or_default()),
        }
    }
    if open.is_empty() { Ok(()) } else { Err(format!("never closed: {open:?}")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_people_typed_stays_text() {
        let element = Element::new("td").with("title", "a\"b<c").text("<script>&\u{1}");
        assert_eq!(element.to_string(), "<td title=\"a&quot;b&lt;c\">&lt;script&gt;&amp;\u{fffd}</td>");
        assert_eq!(balanced(&element.to_string()), Ok(()));
    }

    #[test]
    fn unbalanced_pages_are_found() {
        assert!(balanced("<a><b></a></b>").is_err());
        assert!(balanced("<a><b></b>").is_err());
        assert!(balanced("<!doctype html><a><br/>x</a>").is_ok());
    }

    #[test]
    fn numbers_are_short() {
        assert_eq!((number(3.0), number(2.26), number(-0.5)), ("3".to_owned(), "2.3".to_owned(), "-0.5".to_owned()));
    }
}

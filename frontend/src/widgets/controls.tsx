import type { ComponentChildren } from "preact";
import { useEffect, useId, useState } from "preact/hooks";

interface SegmentsProps<V extends string> {
  legend: string;
  options: { value: V; label: string; disabled?: boolean; title?: string }[];
  value: V;
  onChange: (value: V) => void;
}

/** A choice of one among few, all of them in sight. */
export function Segments<V extends string>({ legend, options, value, onChange }: SegmentsProps<V>) {
  const name = useId();
  return (
    <fieldset class="segments">
      <legend class="visually-hidden">{legend}</legend>
      {options.map((option) => (
        <label key={option.value} title={option.title}>
          <input
            type="radio"
            name={name}
            value={option.value}
            checked={option.value === value}
            disabled={option.disabled ?? false}
            onChange={() => onChange(option.value)}
          />
          {option.label}
        </label>
      ))}
    </fieldset>
  );
}

interface FieldProps {
  label: string;
  children: ComponentChildren;
}

/** A control with its label above it. */
export function Field({ label, children }: FieldProps) {
  return (
    // biome-ignore lint/a11y/noLabelWithoutControl: the control is the child.
    <label class="field">
      <span class="label">{label}</span>
      {children}
    </label>
  );
}

interface NumberFieldProps {
  label: string;
  unit: string;
  /** What stands there while nobody types. */
  text: string;
  parse: (text: string) => number | null;
  onValue: (value: number) => void;
  /** Called when the field is emptied; without it an empty field is no value. */
  onEmpty?: () => void;
}

/** A number with its unit, taken over on Enter or when the field is left. */
export function NumberField({ label, unit, text, parse, onValue, onEmpty }: NumberFieldProps) {
  const [draft, setDraft] = useState<string | null>(null);
  const [wrong, setWrong] = useState(false);
  useEffect(() => {
    setDraft(null);
    setWrong(false);
  }, [text]);
  function take(): void {
    if (draft === null) return;
    if (draft.trim() === "" && onEmpty) {
      setDraft(null);
      onEmpty();
      return;
    }
    const value = parse(draft);
    setWrong(value === null);
    if (value === null) return;
    setDraft(null);
    onValue(value);
  }
  return (
    <Field label={label}>
      <span class="with-unit">
        <input
          type="text"
          inputMode="decimal"
          class="narrow"
          value={draft ?? text}
          aria-invalid={wrong}
          onInput={(event) => setDraft(event.currentTarget.value)}
          onBlur={take}
          onKeyDown={(event) => event.key === "Enter" && take()}
        />
        <span class="soft">{unit}</span>
      </span>
    </Field>
  );
}

interface SelectProps {
  label: string;
  options: { value: string; label: string }[];
  value: string;
  onChange: (value: string) => void;
}

/** A choice of one among many. */
export function Select({ label, options, value, onChange }: SelectProps) {
  return (
    <Field label={label}>
      <select value={value} onChange={(event) => onChange(event.currentTarget.value)}>
        {options.map((option) => (
          <option key={option.value} value={option.value}>
            {option.label}
          </option>
        ))}
      </select>
    </Field>
  );
}
